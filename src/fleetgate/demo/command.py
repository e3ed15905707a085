"""`fleetgate demo`: three regions with a real model on this machine, and a tour of what a Gateway does."""

import contextlib
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from fleetgate.cli.client import CommandFailed
from fleetgate.demo.fleet import (
    DOMAIN,
    GATEWAY,
    MODEL,
    REGIONS,
    DemoFailed,
    DemoFleet,
    check_parts,
    create_key,
    fleet_in,
    wait_until_up,
)


def run_demo(once: bool, data_dir: Path | None) -> int:
    """Run the demo and return the exit code. Every process that it started has ended by then."""
    console = Console()
    try:
        check_parts()
        with _interrupted_by_signals(), _folder(data_dir) as folder, _started(folder, console) as fleet:
            # Imported here: it needs the SDK, which `check_parts` looks for.
            from fleetgate.demo.tour import run_tour

            run_tour(fleet, console)
            console.print("[bold green]Every claim of the tour holds.[/]")
            if not once:
                _wait_for_interrupt(fleet, console)
    except (DemoFailed, CommandFailed) as failure:
        sys.stderr.write(f"{failure}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"the demo cannot use {error.filename}: {error.strerror}; give another --data-dir\n")
        return 1
    except KeyboardInterrupt:
        console.print("\nstopped")
        return 0 if not once else 1
    return 0


@contextlib.contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end the demo in order, even if the shell started it with Ctrl-C ignored."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _folder(data_dir: Path | None) -> Iterator[Path]:
    if data_dir is not None:
        data_dir = data_dir.expanduser().absolute()
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield data_dir
        return
    with tempfile.TemporaryDirectory(prefix="fleetgate-demo-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextlib.contextmanager
def _started(folder: Path, console: Console) -> Iterator[DemoFleet]:
    with contextlib.ExitStack() as stack:
        with console.status("starting the control plane and the proxies") as status:
            fleet = stack.enter_context(fleet_in(folder))

            def show_progress(up: set[str]) -> None:
                marks = [f"{region} {'[green]up[/]' if region in up else '…'}" for region in REGIONS]
                status.update(f"starting {MODEL} in three regions: {' · '.join(marks)}")

            wait_until_up(fleet, show_progress)
            create_key(fleet)
        console.print(f"{MODEL} runs in {', '.join(REGIONS)}; one endpoint: {fleet.endpoint}\n")
        yield fleet


def _wait_for_interrupt(fleet: DemoFleet, console: Console) -> None:
    """Print how to try the demo, and wait for Ctrl-C."""
    host = f"{GATEWAY}.{DOMAIN}"
    body = f'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "Say hello."}}]}}'
    lines = [
        f"endpoint  {fleet.endpoint}   (also as http://{host}:{fleet.endpoint.split(':')[2]})",
        f"key       {fleet.key}",
        f"console   {fleet.api_url}/#token={fleet.owner_token}",
        "",
        f"curl -N {fleet.endpoint}/chat/completions -H 'Authorization: Bearer {fleet.key}' \\",
        f"  -H 'Content-Type: application/json' -d '{body}'",
        "",
        "Ctrl-C stops everything.",
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    while fleet.up.poll() is None:
        threading.Event().wait(1.0)
    raise DemoFailed("`fleetgate up` exited; its log is up.log in the data directory (give --data-dir to keep it)")
