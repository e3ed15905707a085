"""`fleetgate calibrate`: starts a calibration in the control process, shows how far it is, and cancels it on Ctrl-C."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fleetgate.cli.client import Client, CommandFailed, resource_path
from fleetgate.cli.output import Output, console, print_json, print_yaml

LOOK_EVERY_S = 0.25


def show_plan(client: Client, path: str, order: dict[str, Any], output: Output) -> None:
    """Print what would be sent. Raises: `CommandFailed`."""
    plan = client.post(path, {**order, "dry_run": True})
    match output:
        case Output.JSON:
            print_json(plan)
        case Output.YAML:
            print_yaml([plan])
        case Output.TABLE:
            shown = console()
            shown.print(cost_sentence(plan), markup=False)
            shown.print("It would send, in this order, until the engine is saturated:", markup=False)
            for one, times in _grouped(plan["rounds"]):
                shown.print(f"  {_round_sentence(one, times)}", markup=False)
            shown.print("Nothing was sent.", markup=False)


def calibrate(client: Client, path: str, order: dict[str, Any]) -> dict[str, Any]:
    """Run a calibration to its end and give it as the API shows it.

    Raises: `CommandFailed`, also when it failed or was cancelled.
    """
    plan = client.post(path, {**order, "dry_run": True})
    sys.stderr.write(f"{cost_sentence(plan)}\n")
    try:
        job = client.post(path, order)
    except KeyboardInterrupt:
        raise CommandFailed(
            [f"interrupted while it began; if GET {path} shows it as running, DELETE {path}/ID ends it"]
        ) from None
    own_path = f"{path}/{job['id']}"
    try:
        with _bar() as bar:
            task = bar.add_task(job["step"], total=1.0)
            while job["state"] == "running":
                time.sleep(LOOK_EVERY_S)
                job = client.get(own_path)
                sent = f"{job['step']} · {job['requests']} requests, {job['tokens']:,} tokens"
                bar.update(task, completed=job["share"], description=sent)
    except KeyboardInterrupt:
        job = client.delete(own_path)
    if job["state"] != "done":
        raise CommandFailed([job["sentence"]])
    return dict(job)


def print_result(job: dict[str, Any], used: bool, output: Output) -> None:
    """Print the Profile, and on standard error the line that puts it to use."""
    if output is Output.JSON:
        print_json(job["profile"])
    else:
        print_yaml([job["profile"]])
    name, deployment = job["profile"]["name"], job["deployment"]
    lines = [job["sentence"]]
    if used:
        lines.append(f"Deployment {deployment} uses it now.")
    else:
        lines.append(f"To use it, add this line to Deployment {deployment}, or calibrate with --use:")
        lines.append(f"profile: {name}")
    sys.stderr.write("\n".join(lines) + "\n")


def path_of(deployment: str) -> str:
    """The API's path of a Deployment's calibrations."""
    return f"{resource_path('deployments', deployment)}/calibrations"


def cost_sentence(plan: dict[str, Any]) -> str:
    """What it may cost."""
    return (
        f"Calibrating {plan['model']} on Deployment {plan['deployment']}: at most {plan['requests_max']} requests and "
        f"{plan['tokens_max']:,} tokens, about {max(1.0, plan['expected_s']):.0f} s; "
        f"it ends sooner where TPOT passes {plan['tpot_s']:g} s or the engine is full."
    )


def _bar() -> Progress:
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def _grouped(rounds: list[dict[str, Any]]) -> list[tuple[dict[str, Any], int]]:
    """Rounds that follow one another and are alike, with their number."""
    groups: list[tuple[dict[str, Any], int]] = []
    for one in rounds:
        if groups and groups[-1][0] == one:
            groups[-1] = (one, groups[-1][1] + 1)
        else:
            groups.append((one, 1))
    return groups


def _round_sentence(one: dict[str, Any], times: int) -> str:
    at_once = one["at_once"]
    requests = f"{times} x {at_once} request{'s' if at_once > 1 else ''}{' at once' if at_once > 1 else ''}"
    return f"{one['measures']:8} {requests}, {one['prompt_tokens']:,} prompt and {one['output_tokens']} output tokens"
