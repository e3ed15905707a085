"""`fleetgate reload`: asks for a rolling upgrade and waits until the new workers serve."""

import time
from typing import Any

from fleetgate.cli.client import Client, CommandFailed

LOOK_EVERY_S = 0.2
SERVE_S_MAX = 90.0  # the supervisor gives up after 60


def reload(client: Client) -> list[dict[str, Any]]:
    """Begin, wait, and give the workers that serve now.

    Raises: `CommandFailed`.
    """
    replaced = set(client.post("/api/v1/reload", {})["replaced_pids"])
    deadline_s = time.monotonic() + SERVE_S_MAX
    while time.monotonic() < deadline_s:
        time.sleep(LOOK_EVERY_S)
        try:
            workers: list[dict[str, Any]] = client.get("/api/v1/state")["workers"]
        except CommandFailed:
            continue  # the control process is replaced as well, after the workers
        serving = [worker for worker in workers if worker["accepting"]]
        if len(serving) >= len(replaced) and not replaced & {worker["pid"] for worker in serving}:
            return serving
    raise CommandFailed(
        [
            "the new workers do not serve yet; those from before go on. `fleetgate get events` and the log of "
            "`fleetgate up` tell why"
        ]
    )
