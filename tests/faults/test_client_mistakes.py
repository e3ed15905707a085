"""Mistakes of our own and a loop that stands still: FAULTS.md rows 74 and 75, with the mistake put in from outside."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fleetgate.ipc.event_spool import EventSpool
from fleetgate.ipc.machine_status import overload_reasons
from fleetgate.ipc.shared_memory import WorkerCell
from tests.loopback.wall_client import Client, request
from tests.loopback.wall_rig import Plane, plane
from tests.waiting import wait_for

SECRET = "sk-a-secret-in-a-prompt"


def breaks(name: str, when: str, how: str = "1 // 0") -> dict[str, float]:
    """Make a function of `fleetgate.proxy` do something else first when a condition on its arguments holds."""
    wrapped = f"(lambda real: lambda self, *a, **k: ({how}) if ({when}) else real(self, *a, **k))({name})"
    return {name: wrapped}  # type: ignore[dict-item]


HANDLER = "fleetgate.proxy.request.handler"
# Where it breaks, and whether something of the answer is out by then.
PLACES = {
    "reading the body": (breaks("fleetgate.protocols.clients.openai.parse_request", "b'boom' in self"), False),
    "picking": (breaks(f"{HANDLER}.ACTIONS[{HANDLER}.moves.Pick]", "b'boom' in self.received.body"), False),
    "sending": (breaks("fleetgate.proxy.request.attempt.request_bytes", "b'boom' in self.received.body"), False),
    "the first content": (breaks(f"{HANDLER}.ACTIONS[{HANDLER}.moves.Commit]", "b'boom' in self.received.body"), False),
    "an event": (
        breaks(
            "fleetgate.proxy.request.response.writer.ResponseWriter.write",
            "b'tok' in a[0] and self.written and b'boom' in self.client.request.received.body",
        ),
        True,
    ),
    "the end": (
        breaks(f"{HANDLER}.RequestHandler.on_answered", "b'boom' in self.received.body and self.received.info.stream"),
        True,
    ),
    "the tick": (breaks(f"{HANDLER}.RequestHandler._check_progress", "b'boom' in self.received.body"), False),
}  # fmt: skip


def lines_of(capfd: pytest.CaptureFixture[str], event: str, request_id: str = "") -> list[dict[str, Any]]:
    """The lines on stderr until one has this event and request id: a thread writes them, also after the answer."""
    lines: list[dict[str, Any]] = []

    def found() -> bool:
        lines.extend(json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{"))
        return any(line["event"] == event and request_id in ("", line.get("id")) for line in lines)

    wait_for(found)
    return lines


@contextmanager
def broken(name: str) -> Iterator[Plane]:
    with plane(patience=PLACES[name][0]) as made:
        yield made


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("name", PLACES)
def test_row_75_a_mistake_is_a_500_for_that_request_alone(
    name: str, stream: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """The answer names the line of the log that tells where; other requests, and the places they hold, go on."""
    begun = PLACES[name][1]
    if begun and not stream:
        pytest.skip("an answer that is not streamed is written in one piece")
    with broken(name) as made:
        made.use({"concurrency_max": 2})
        made.wall.hold()
        with made.client() as neighbour:
            neighbour.send(request("held", stream=True))
            neighbour.read_until(b"tok")
            for _ in range(3):
                model = "silent" if name == "the tick" else "ok"
                answer = made.ask(request(model, stream, note=f"boom {SECRET}", wall={"pace_s": 0.02}))
                if begun:
                    assert answer.status == 200 and not answer.whole
                    assert b"internal_error" in answer.body and b"[DONE]" not in answer.body
                else:
                    assert (answer.status, answer.code) == (500, "internal_error")
                    assert answer.headers["connection"] == "close"
                assert b"Traceback" not in answer.body and b"ZeroDivision" not in answer.body
                request_id = answer.headers["x-request-id"]
                lines = lines_of(capfd, "internal_error", request_id)
                told = [line for line in lines if line["event"] == "internal_error" and line.get("id") == request_id]
                assert told and "ZeroDivisionError" in told[0]["message"] and SECRET not in str(lines)
            assert made.in_flight() == 1, "their places were given back"
            made.wall.release()
            neighbour.read_until(b"[DONE]")
        made.wait_idle()
        assert made.ask(request("ok", stream)).status == 200
        assert made.rig.processes[0].poll() is None
        assert made.rig.board.series_totals()["fleetgate_internal_errors_total"] >= 3


@pytest.mark.parametrize("method", ["_read_head", "_lose"])
def test_row_75_a_mistake_while_an_answer_is_read_ends_that_request_and_blames_no_endpoint(
    method: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another Endpoint would meet the same bug: a few such requests would eject them all."""
    name = f"fleetgate.proxy.transport.response_relay.ResponseRelay.{method}"
    model = "ok" if method == "_read_head" else "fin-before"
    with plane(patience=breaks(name, "b'boom' in self.listener.received.body")) as made:
        made.use({})
        for number in range(12):
            answer = made.ask(request(model, stream=number % 2 == 0, note="boom"))
            assert (answer.status, answer.code) == (500, "internal_error")
            assert lines_of(capfd, "internal_error", answer.headers["x-request-id"])
        made.wait_idle()
        assert made.ask(request("ok")).status == 200
        assert made.rig.board.series_totals()["fleetgate_internal_errors_total"] >= 12


@pytest.mark.parametrize("name", ["ticker.Ticker._learn", "snapshots.WorkerSnapshots.tick"])
def test_row_75_a_sweep_that_breaks_keeps_sweeping(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    data_dir = "__import__('json').loads(__import__('os').environ['FLEETGATE_WORKER'])['data_dir']"
    when = f"__import__('pathlib').Path({data_dir}, 'boom').exists()"
    with plane(patience=breaks(f"fleetgate.proxy.worker.{name}", when)) as made:
        (made.rig.data_dir / "boom").touch()
        wait_for(lambda: bool(made.rig.board.series_totals().get("fleetgate_internal_errors_total")))
        before = made.rig.board.get(0, WorkerCell.HEARTBEAT_MS)
        wait_for(lambda: made.rig.board.get(0, WorkerCell.HEARTBEAT_MS) > before + 2500)
        assert made.ask(request("ok")).status == 200
    assert lines_of(capfd, "internal_error")


def test_row_74_a_loop_that_stands_still_is_told_with_its_place(capfd: pytest.CaptureFixture[str]) -> None:
    """One second of sleep in a request: a metric, the board for readiness, an Event, a line that names the place."""
    sleeps = breaks(
        "fleetgate.protocols.clients.openai.parse_request", "b'boom' in self and __import__('time').sleep(1.0)", "0"
    )
    with plane(patience=sleeps) as made:
        made.use({})
        done = threading.Event()

        def ask() -> None:
            made.ask(request("ok", note="boom"))
            done.set()

        before_ms = time.monotonic() * 1000
        threading.Thread(target=ask, daemon=True).start()
        assert done.wait(20)
        wait_for(lambda: made.rig.board.get(0, WorkerCell.LAG_AT_MS) > before_ms)
        told_of = overload_reasons(made.rig.board, 0, time.monotonic())
        assert any("was blocked for" in sentence for sentence in told_of), told_of
        assert 700 <= made.rig.board.get(0, WorkerCell.LAG_MS) < 5000
        totals = made.rig.board.series_totals()
        assert totals["fleetgate_loop_lags_total"] >= 1
        assert totals["fleetgate_loop_lag_milliseconds_total"] >= 700
        happened = [each for each in EventSpool(made.rig.data_dir).take() if each.kind == "Proxy"]
        assert happened and "the event loop was blocked" in happened[-1].message
        assert made.ask(request("ok")).status == 200
    told = [line for line in lines_of(capfd, "lag") if line["event"] == "lag"]
    assert told and "downstream/client_connection.py" in told[-1]["message"] and "_serve" in told[-1]["message"], told


def test_row_74_a_quiet_loop_is_not_accused(capfd: pytest.CaptureFixture[str]) -> None:
    with plane() as made, Client(made.port) as client:
        for _ in range(200):
            assert client.ask(request("ok")).status == 200
            time.sleep(0.005)
        lags = made.rig.board.series_totals().get("fleetgate_loop_lags_total", 0)
    assert lags <= 2, "only what a busy machine itself does"
