"""`fleetgate calibrate`: starts a calibration in the control process, shows its progress, cancels it on Ctrl-C."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fleetgate.cli.client import Client, CommandFailed, resource_path
from fleetgate.cli.output import Output, console, print_json, print_yaml

POLL_EVERY_S = 0.25
# Errors of the API name its fields, and a user of the command knows the flags.
FLAGS = {
    "model": "--model",
    "requests_max": "--max-requests",
    "tokens_max": "--max-tokens",
    "tpot_s": "--tpot-s",
    "ttft_s": "--ttft-s",
    "profile": "--profile",
}


def show_plan(client: Client, path: str, body: dict[str, Any], output: Output) -> None:
    """Print the requests that a calibration would send. Raises: `CommandFailed`."""
    plan = client.post(path, {**body, "dry_run": True}, FLAGS)
    match output:
        case Output.JSON:
            print_json(plan)
        case Output.YAML:
            print_yaml([plan])
        case Output.TABLE:
            terminal = console()
            terminal.print(cost_sentence(plan), markup=False)
            terminal.print("It would send these requests, in this order, until the engine is saturated:", markup=False)
            for step, times in _group_equal(plan["rounds"]):
                terminal.print(f"  {_step_sentence(step, times)}", markup=False)
            terminal.print("Nothing was sent.", markup=False)


def run_calibration(client: Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Run a calibration to its end, and return it as the API shows it.

    Raises: `CommandFailed`, also if the calibration failed or was cancelled.
    """
    plan = client.post(path, {**body, "dry_run": True}, FLAGS)
    sys.stderr.write(f"{cost_sentence(plan)}\n")
    try:
        job = client.post(path, body, FLAGS)
    except KeyboardInterrupt:
        raise CommandFailed(
            [f"interrupted before the API answered; if GET {path} lists a running one, DELETE {path}/ID ends it"]
        ) from None
    job_path = f"{path}/{job['id']}"
    try:
        with _progress_bar() as bar:
            task = bar.add_task(job["step"], total=1.0)
            while job["state"] == "running":
                time.sleep(POLL_EVERY_S)
                job = client.get(job_path)
                description = f"{job['step']} · {job['requests']} requests, {job['tokens']:,} tokens"
                bar.update(task, completed=job["share"], description=description)
    except KeyboardInterrupt:
        job = client.delete(job_path)
    if job["state"] != "done":
        raise CommandFailed([job["sentence"]])
    return dict(job)


def print_result(job: dict[str, Any], used: bool, output: Output) -> None:
    """Print the Profile, and on standard error how to use it."""
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


def calibrations_path(deployment: str) -> str:
    """Return the API path of a Deployment's calibrations."""
    return f"{resource_path('deployments', deployment)}/calibrations"


def cost_sentence(plan: dict[str, Any]) -> str:
    """Say what a calibration may cost."""
    return (
        f"Calibrating {plan['model']} on Deployment {plan['deployment']}: at most {plan['requests_max']} requests and "
        f"{plan['tokens_max']:,} tokens, about {max(1.0, plan['expected_s']):.0f} s; "
        f"it ends sooner if TPOT exceeds {plan['tpot_s']:g} s or the engine is full."
    )


def _progress_bar() -> Progress:
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def _group_equal(steps: list[dict[str, Any]]) -> list[tuple[dict[str, Any], int]]:
    """Group equal steps that follow one another; return each with its number of repetitions."""
    groups: list[tuple[dict[str, Any], int]] = []
    for step in steps:
        if groups and groups[-1][0] == step:
            groups[-1] = (step, groups[-1][1] + 1)
        else:
            groups.append((step, 1))
    return groups


def _step_sentence(step: dict[str, Any], times: int) -> str:
    at_once = step["at_once"]
    requests = f"{times} x {at_once} request{'s' if at_once > 1 else ''}{' at once' if at_once > 1 else ''}"
    return (
        f"{step['measures']:8} {requests}, {step['prompt_tokens']:,} prompt and {step['output_tokens']} output tokens"
    )
