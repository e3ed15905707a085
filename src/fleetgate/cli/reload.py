"""`fleetgate reload`: requests a rolling upgrade, and waits until the new workers serve."""

import time
from typing import Any

from fleetgate.cli.client import Client, CommandFailed

POLL_EVERY_S = 0.2
SERVE_S_MAX = 90.0  # the supervisor cancels an upgrade after 60 s


def reload(client: Client) -> list[dict[str, Any]]:
    """Begin an upgrade, wait, and return the workers that serve then.

    Raises: `CommandFailed`.
    """
    replaced = set(client.post("/api/v1/reload", {})["replaced_pids"])
    deadline_s = time.monotonic() + SERVE_S_MAX
    while time.monotonic() < deadline_s:
        time.sleep(POLL_EVERY_S)
        try:
            workers: list[dict[str, Any]] = client.get("/api/v1/state")["workers"]
        except CommandFailed:
            continue  # the control process is replaced as well, after the workers
        serving = [worker for worker in workers if worker["accepting"]]
        if len(serving) >= len(replaced) and not replaced & {worker["pid"] for worker in serving}:
            return serving
    raise CommandFailed(
        [
            f"the new workers did not serve within {SERVE_S_MAX:.0f} s and the old workers keep serving; find the "
            "reason with `fleetgate get events` and in the log of `fleetgate up`"
        ]
    )
