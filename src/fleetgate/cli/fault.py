"""`fleetgate fault`: faults on purpose, with an end."""

import re
import sys
from collections.abc import Mapping
from typing import Any

import typer

from fleetgate.cli.client import Client, resource_path
from fleetgate.cli.output import Output, print_json, print_yaml

KINDS = ("delay", "error", "cut", "stall", "refuse")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)?")
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}


def duration_s(text: str, flag: str) -> float:
    """`90`, `90s`, `1.5m`, `500ms`. Raises: `typer.BadParameter`."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a duration such as 60s, 500ms or 2m", param_hint=flag)
    return float(match[1]) * _UNITS_S[match[2]]


def inject(client: Client, order: Mapping[str, Any], output: Output) -> None:
    """Begin one and say how to end it. Raises: `Failed`."""
    fault = client.post("/api/v1/faults", dict(order))
    match output:
        case Output.JSON:
            print_json(fault)
        case Output.YAML:
            print_yaml([fault])
        case Output.TABLE:
            sys.stdout.write(
                f"fault {fault['name']} is in force: {fault['kind']} for {fault['share']:.0%} of the requests to "
                f"{fault['deployment']}, {fault['left_s']:.0f} s at most\n"
                f"to end it sooner: fleetgate fault end {fault['name']}\n"
            )


def end(client: Client, name: str) -> None:
    """End one. Raises: `Failed`."""
    fault = client.delete(resource_path("faults", name))
    sys.stdout.write(f"fault {name} ended; it struck {fault['struck']} requests\n")
