"""What takes much away is asked about: the person at the terminal, or --yes where there is none."""

import sys
from collections.abc import Callable
from typing import Any

import typer

from fleetgate.cli.client import CommandFailed, NeedsConfirmation


def sent_once_sure(send: Callable[[bool], Any], yes: bool, may_ask: bool = True) -> Any:
    """Send a change, and once more if the API asks and the answer is yes.

    Shape: `send` takes whether it is confirmed; `may_ask` is False where standard input is used for something else.
    Raises: `CommandFailed` when nobody said yes; its sentence names --yes where nobody could.
    """
    try:
        return send(yes)
    except NeedsConfirmation as asked:
        if not (may_ask and sys.stdin.isatty()):
            raise
        for message in asked.messages:
            sys.stderr.write(f"{message}\n")
        if not typer.confirm("Do it?", err=True):
            raise CommandFailed(["nothing was changed"]) from asked
        return send(True)
