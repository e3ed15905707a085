"""`fleetgate fault`: injects faults, each with an end."""

import re
import sys
from collections.abc import Mapping
from typing import Any

import typer

from fleetgate.cli.client import Client, resource_path
from fleetgate.cli.output import Output, print_json, print_yaml

FAULT_KINDS = ("delay", "error", "cut", "stall", "refuse")
# Errors of the API name its fields, and a user of the command knows the flags.
FLAGS = {
    "kind": "KIND",
    "deployment": "--deployment",
    "share": "--share",
    "for_s": "--for",
    "stop_below_slo": "--stop-below-slo",
    "delay_s": "--delay",
    "status": "--status",
    "name": "--name",
}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)?")
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}


def duration_s(text: str, flag: str) -> float:
    """Read a duration: `90`, `90s`, `1.5m`, `500ms`. Raises: `typer.BadParameter`, which names the flag."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a duration; write it like 60s, 500ms or 2m", param_hint=flag)
    return float(match[1]) * _UNITS_S[match[2]]


def begin_fault(client: Client, body: Mapping[str, Any], output: Output) -> None:
    """Begin a fault, and print how to end it. Raises: `CommandFailed`."""
    fault = client.post("/api/v1/faults", dict(body), FLAGS)
    match output:
        case Output.JSON:
            print_json(fault)
        case Output.YAML:
            print_yaml([fault])
        case Output.TABLE:
            sys.stdout.write(
                f"fault {fault['name']} began: {fault['kind']} for {fault['share']:.0%} of the requests to Deployment "
                f"{fault['deployment']}, for {fault['left_s']:.0f} s at most\n"
                f"to end it now: fleetgate fault end {fault['name']}\n"
            )


def stop_fault(client: Client, name: str) -> None:
    """End a fault. Raises: `CommandFailed`."""
    fault = client.delete(resource_path("faults", name))
    sys.stdout.write(f"fault {name} ended; it affected {fault['struck']} requests\n")
