"""`--ops-listen`: liveness, readiness and the metrics that matter when the control process is away, from the workers.

Every worker answers on one socket for the whole machine, so it answers for as long as one of them lives.
"""

import asyncio
import time
from collections.abc import Iterator
from http import HTTPStatus

import msgspec

from fleetgate.ipc.machine_status import MachineStatus, machine_status
from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell

HEAD_BYTES_MAX = 8192
PATIENCE_S = 5.0
CONNECTIONS_MAX = 64
_JSON, _TEXT = "application/json", "text/plain; version=0.0.4; charset=utf-8"


class OpsServer:
    """One worker's share of the operations listener."""

    def __init__(self, board: SharedMemory) -> None:
        self._board = board
        self._open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request on one connection."""
        self._open += 1
        try:
            if self._open <= CONNECTIONS_MAX:
                async with asyncio.timeout(PATIENCE_S):
                    words = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n", 1)[0].split(b" ")
                    writer.write(self._answer(words))
                    await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # whoever asked has gone, or sends something else than HTTP
        finally:
            self._open -= 1
            writer.close()

    def _answer(self, words: list[bytes]) -> bytes:
        if len(words) != 3 or words[0] not in (b"GET", b"HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, _TEXT, b"only GET and HEAD\n", False)
        now_s, epoch_s = time.monotonic(), time.time()
        status, kind = HTTPStatus.OK, _TEXT
        match words[1].partition(b"?")[0]:
            case b"/healthz":
                body = b"ok\n"
            case b"/readyz":
                kind, standing = _JSON, machine_status(self._board, now_s, epoch_s)
                reasons = _reasons_against(self._board, standing)
                status = HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK
                body = msgspec.json.encode(readiness(standing, reasons))
            case b"/metrics":
                standing = machine_status(self._board, now_s, epoch_s)
                body = "".join(f"{line}\n" for line in _metrics(self._board, standing)).encode()
            case _:
                status, body = HTTPStatus.NOT_FOUND, b"ask for /healthz, /readyz or /metrics\n"
        return _response(status, kind, body, words[0] == b"HEAD")


def readiness(standing: MachineStatus, reasons: list[str]) -> dict[str, object]:
    """The body of `/readyz`."""
    return {
        "ready": not reasons,
        "reasons": reasons,
        "degraded": standing.degraded,
        "snapshot": {"version": standing.version, "age_s": round(standing.age_s, 1)},
        "control_silent_s": round(standing.control_plane_silent_s, 1),
    }


def _reasons_against(board: SharedMemory, standing: MachineStatus) -> list[str]:
    """One worker that accepts is enough: this is for load balancers, who should not take a machine out for less."""
    if not any(board.get(worker, WorkerCell.ACCEPTING) for worker in range(board.workers)):
        return ["no worker accepts connections"]
    return [] if standing.version else ["this proxy was never configured: it has no Snapshot"]


def _metrics(board: SharedMemory, standing: MachineStatus) -> Iterator[str]:
    yield "# TYPE fleetgate_snapshot_age_seconds gauge"
    yield f"fleetgate_snapshot_age_seconds {standing.age_s:.3f}"
    yield "# TYPE fleetgate_control_silent_seconds gauge"
    yield f"fleetgate_control_silent_seconds {standing.control_plane_silent_s:.3f}"
    yield "# TYPE fleetgate_snapshot_version gauge"
    for worker in range(board.workers):
        if board.get(worker, WorkerCell.PID):
            yield f'fleetgate_snapshot_version{{worker="{worker}"}} {board.get(worker, WorkerCell.SNAPSHOT_VERSION)}'
    typed = ""
    for name, value in sorted(board.series_totals().items()):
        metric = name.partition("{")[0]
        if metric.endswith("_total"):  # histograms are put together by the control process only
            if metric != typed:
                typed = metric
                yield f"# TYPE {metric} counter"
            yield f"{name} {value}"


def _response(status: HTTPStatus, kind: str, body: bytes, no_body: bool) -> bytes:
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode() + (b"" if no_body else body)
