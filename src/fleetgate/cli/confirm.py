"""Confirmation of changes that remove much of the fleet: on the terminal, or by --yes."""

import sys
from collections.abc import Callable
from typing import Any

import typer

from fleetgate.cli.client import CommandFailed, NeedsConfirmation


def send_confirmed(send: Callable[[bool], Any], yes: bool, may_ask: bool = True) -> Any:
    """Send a change, and send it again with a confirmation if the API needs one and the user gives it.

    Shape: `send` takes whether the change is confirmed; `may_ask` is False if standard input is in use.

    Raises: `CommandFailed` if the user declines; `NeedsConfirmation` without a terminal; its text names --yes.
    """
    try:
        return send(yes)
    except NeedsConfirmation as question:
        if not (may_ask and sys.stdin.isatty()):
            raise
        for message in question.messages:
            sys.stderr.write(f"{message}\n")
        if not typer.confirm("Apply this change?", err=True):
            raise CommandFailed(["cancelled; nothing was changed"]) from question
        return send(True)
