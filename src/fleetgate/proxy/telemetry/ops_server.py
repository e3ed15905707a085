"""`--ops-listen`: liveness, readiness and the workers' metrics, also while the control process is away.

All workers serve one socket of the machine, so it responds while one of them runs.
"""

import asyncio
import time
from collections.abc import Iterator
from http import HTTPStatus

import msgspec

from fleetgate.ipc.exposition import (
    OPENMETRICS_TYPE,
    TEXT_TYPE,
    Family,
    exposition_text,
    read_series,
    series_families,
    wants_openmetrics,
)
from fleetgate.ipc.machine_status import MachineStatus, machine_status, running_workers
from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell

HEAD_BYTES_MAX = 8192
TIMEOUT_S = 5.0
CONNECTIONS_MAX = 64
_JSON = "application/json"


class OpsServer:
    """One worker's share of the operations listener."""

    def __init__(self, shared_memory: SharedMemory) -> None:
        self._shared_memory = shared_memory
        self._open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request on one connection."""
        self._open += 1
        try:
            if self._open <= CONNECTIONS_MAX:
                async with asyncio.timeout(TIMEOUT_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(self.response(head))
                    await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the client has left, or does not speak HTTP
        finally:
            self._open -= 1
            writer.close()

    def response(self, head: bytes) -> bytes:
        """The response to a request head."""
        request_line, *fields = head.split(b"\r\n")
        words = request_line.split(b" ")
        if len(words) != 3 or words[0] not in (b"GET", b"HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, TEXT_TYPE, b"use GET or HEAD\n", False)
        shared_memory = self._shared_memory
        status, content_type = HTTPStatus.OK, TEXT_TYPE
        match words[1].partition(b"?")[0]:
            case b"/healthz":
                body = b"ok\n"
            case b"/readyz":
                content_type, machine = _JSON, machine_status(shared_memory, time.monotonic(), time.time())
                reasons = _reasons_against(shared_memory, machine)
                status = HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK
                body = msgspec.json.encode(readiness(machine, reasons))
            case b"/metrics":
                openmetrics = wants_openmetrics(_accept(fields))
                content_type = OPENMETRICS_TYPE if openmetrics else TEXT_TYPE
                machine = machine_status(shared_memory, time.monotonic(), time.time())
                body = exposition_text(families(shared_memory, machine), openmetrics).encode()
            case _:
                status, body = HTTPStatus.NOT_FOUND, b"use /healthz, /readyz or /metrics\n"
        return _response(status, content_type, body, words[0] == b"HEAD")


def readiness(machine: MachineStatus, reasons: list[str]) -> dict[str, object]:
    """The body of `/readyz`."""
    return {
        "ready": not reasons,
        "reasons": reasons,
        "degraded": machine.degraded,
        "snapshot": {"version": machine.version, "age_s": round(machine.age_s, 1)},
        "control_silent_s": round(machine.control_plane_silent_s, 1),
    }


def _reasons_against(shared_memory: SharedMemory, machine: MachineStatus) -> list[str]:
    """Why the machine is not ready. One worker that accepts is enough for a load balancer to keep the machine."""
    if not any(shared_memory.get(worker, WorkerCell.ACCEPTING) for worker in range(shared_memory.workers)):
        return ["no worker accepts connections"]
    return [] if machine.version else ["this proxy was never configured: it has no Snapshot"]


def families(shared_memory: SharedMemory, machine: MachineStatus) -> Iterator[Family]:
    """Every metric that the workers know without the control process."""
    yield Family("fleetgate_snapshot_age_seconds").add((), round(machine.age_s, 3))
    yield Family("fleetgate_control_silent_seconds").add((), round(machine.control_plane_silent_s, 3))
    version = Family("fleetgate_snapshot_version")
    for worker in running_workers(shared_memory):
        version.add((str(worker),), shared_memory.get(worker, WorkerCell.SNAPSHOT_VERSION))
    yield version
    yield from series_families(read_series(shared_memory.series_totals()))


def _accept(fields: list[bytes]) -> str:
    values = (value for name, _, value in (field.partition(b":") for field in fields) if name.lower() == b"accept")
    return b",".join(values).decode("latin-1")


def _response(status: HTTPStatus, content_type: str, body: bytes, no_body: bool) -> bytes:
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode() + (b"" if no_body else body)
