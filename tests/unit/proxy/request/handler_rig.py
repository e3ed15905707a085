"""A request handler between a transport and a client that only write down what it does. No loop, no bytes to parse."""

from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any, cast

import msgspec

from fleetgate.core.admission.ledger import Ledger
from fleetgate.core.admission.work_ledger import WORK_CELLS, WorkCell, WorkLedger
from fleetgate.core.capacity.token_estimates import TokenEstimates
from fleetgate.core.exchange import AttemptFailed, Failure
from fleetgate.core.model import Snapshot
from fleetgate.ipc.event_spool import EventRecord, EventSpool
from fleetgate.ipc.shared_memory import SharedMemory
from fleetgate.protocols.http1 import parse_request_head
from fleetgate.protocols.messages import Usage
from fleetgate.protocols.resume.transcript import Transcript
from fleetgate.proxy.downstream.authenticator import ANONYMOUS
from fleetgate.proxy.health.event_messages import DeploymentEvents
from fleetgate.proxy.health.passive_health import PassiveHealthChecker
from fleetgate.proxy.health.poison_detector import PoisonDetector
from fleetgate.proxy.request.attempt import AttemptServices
from fleetgate.proxy.request.attempts import AttemptEffects
from fleetgate.proxy.request.handler import RequestHandler
from fleetgate.proxy.request.outcome import OutcomeRecorder
from fleetgate.proxy.request.placement import Placer
from fleetgate.proxy.request.registry import RequestRegistry
from fleetgate.proxy.request.request_context import ReceivedRequest, RequestContext
from fleetgate.proxy.request.reservation import CapacityAccounts
from fleetgate.proxy.request.response.heads import ResponseDefaults
from fleetgate.proxy.request.services import HandlerServices
from fleetgate.proxy.routing.active_table import ActiveTable
from fleetgate.proxy.routing.capacity_tracker import CapacityTracker
from fleetgate.proxy.routing.routing_table import RoutingTable, RoutingTableBuilder
from fleetgate.proxy.snapshot.snapshot_file import EMPTY
from fleetgate.proxy.telemetry.access_log import AccessLog
from fleetgate.proxy.telemetry.metrics import WorkerMetrics
from fleetgate.proxy.telemetry.request_metrics import RequestMetricsCache
from fleetgate.proxy.transport.connection_pool import ConnectionPool
from fleetgate.proxy.transport.interface import ExpectedResponse, ResponseListener
from tests.loopback.control_rig import board_of
from tests.loopback.rig import deployment, gateway

NAMES = ("one", "two", "three")
TICK_S = 0.05


class FakeResponse:
    """A response that the test plays. It reports what the interface allows, in the order that it allows."""

    def __init__(
        self, name: str, request: tuple[bytes, ...], expected: ExpectedResponse, listener: ResponseListener
    ) -> None:
        self.name, self.request, self.expected, self.listener = name, b"".join(request), expected, listener
        self.transcript: Transcript | None = None
        self.status, self.stream, self.raw = 0, False, expected.raw
        self.passed = b"content-type: text/plain\r\n"
        self.held: list[bytes] = []
        self.usage: Usage | None = None
        self.own_usage: Usage | None = None
        self.inherited = self.event_count = self.body_bytes = self.beats = 0
        self.finish_seen = self.is_connected = self.paused = self.over = self.has_content = self.was_kept = False
        self.commands: list[str] = []
        self.only_the_tail_is_missing = False

    # --- what the handler does ---

    def cancel(self) -> None:
        assert not self.over or not self.is_connected
        if not self.over:
            self.over, self.is_connected = True, False
            self.commands.append("cancel")

    def pause(self) -> None:
        self.paused = True
        self.commands.append("pause")

    def resume(self) -> None:
        self.paused = False
        self.commands.append("resume")

    def finish(self) -> bool:
        if self.only_the_tail_is_missing:
            self.end()
        return self.only_the_tail_is_missing

    # --- what the test plays ---

    def connect(self) -> None:
        """The connection is made."""
        self.is_connected = True
        self.listener.on_connected(cast(Any, self))
        if self.over:
            self.is_connected = False

    def content(self, words: str = "a", status: int = 200) -> None:
        """The first content: of a stream, or a whole body, which is then the end."""
        self.has_content, self.status, self.stream = True, status, not self.expected.wants_whole and status == 200
        self.held = [words.encode()]
        if self.stream:
            self.event_count = 1
            self.listener.on_first(cast(Any, self))
            if not self.over:
                self._keep(words)
                self.listener.write(b"".join(self.held))
                self.held = []
            return
        self.finish_seen, self.body_bytes = True, len(words)
        self.usage = Usage(prompt_tokens=3, completion_tokens=2)
        self.listener.on_first(cast(Any, self))
        if not self.over:
            self._end(b"")

    def event(self, words: str = "b") -> None:
        """One event more of a stream."""
        self.event_count += 1
        self._keep(words)
        self.listener.write(words.encode())

    def _keep(self, words: str) -> None:
        if self.transcript is not None:
            self.transcript.keep(
                b'data: {"id":"1","model":"m","choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % words.encode()
            )

    def end(self) -> None:
        """The stream ends as it should."""
        self.finish_seen = True
        self.usage = Usage(prompt_tokens=3, completion_tokens=self.event_count)
        self._end(b".")

    def _end(self, tail: bytes) -> None:
        self.over, self.is_connected = True, False
        self.listener.on_ended(cast(Any, self), tail)

    def fail(self, failure: Failure = Failure.BROKEN) -> None:
        """It is lost after it had a connection."""
        self.over, self.is_connected = True, False
        self.listener.on_failed(cast(Any, self), AttemptFailed(failure, True, 1.0))

    def stale(self) -> None:
        """Its kept connection was closed before it got there."""
        self.over, self.is_connected = True, False
        self.listener.on_stale(cast(Any, self))

    def not_connected(self, failure: Failure = Failure.UNREACHABLE) -> None:
        """Its dial fails; this is reported also if it was cancelled meanwhile."""
        self.listener.on_not_connected(cast(Any, self), failure, "refused")
        self.over = True

    def dial_slow(self) -> None:
        """Its dial takes longer than usual."""
        self.listener.on_dial_slow(cast(Any, self))


class FakeTransport:
    """Keeps what it is asked to send. Shape: `keeps` says whether a kept connection is there."""

    def __init__(self, name_of: Callable[[ConnectionPool], str]) -> None:
        self._name_of = name_of
        self.sent: list[FakeResponse] = []
        self.keeps = True

    def send(
        self,
        pool: ConnectionPool,
        request: tuple[bytes, ...],
        expected: ExpectedResponse,
        listener: ResponseListener,
        *,
        connect_timeout_s: float,
        fresh: bool = False,
    ) -> Any:
        response = FakeResponse(self._name_of(pool), request, expected, listener)
        response.is_connected = response.was_kept = self.keeps and not fresh
        self.sent.append(response)
        return response


class FakeClient:
    """The client's connection. It fails the test at once if anything is written after the end."""

    def __init__(self) -> None:
        self.keep_alive, self.is_behind = True, False
        self.written = b""
        self.ends: list[str] = []
        self.handler: RequestHandler
        self.write: Callable[[bytes], None] = self._write

    def _write(self, data: bytes) -> None:
        assert not self.ends, f"{data!r} was written after {self.ends}"
        self.written += data

    def abort(self) -> None:
        assert "ended" not in self.ends

    def ended(self, now_s: float) -> None:
        assert not self.ends, f"ended after {self.ends}"
        self.ends.append("ended")

    def next_read_deadline_s(self, now_s: float) -> float:
        return now_s + 60.0

    def fail(self, request_id: bytes) -> None:
        raise AssertionError("an internal error")


class NoPoison:
    """No loss is suspicious."""

    def probe_if_suspicious(self, *arguments: object) -> None:
        return None


class Spool:
    """The Events."""

    def __init__(self) -> None:
        self.events: list[EventRecord] = []

    def add(self, event: EventRecord) -> None:
        self.events.append(event)


class Bench:
    """The services of a worker around handlers: real routing, placement, ledger and records, on a clock in hand."""

    def __init__(self, count_: int = 2, each: dict[str, Any] | None = None, **fields: Any) -> None:
        self.now_s = 1000.0
        self.shared: SharedMemory = board_of(1)
        self.soon: list[Callable[[], None]] = []
        self.journal: list[bytes] = []
        self.errors: list[BaseException] = []
        self.spool = Spool()
        self.handlers: list[RequestHandler] = []
        self._make(count_, each or {}, fields)

    def _make(self, count_: int, each: dict[str, Any], fields: dict[str, Any]) -> None:
        shared, clock, metrics = self.shared, self.clock, WorkerMetrics(self.shared, 0)
        ledger, estimates, cache = Ledger(shared, 0), TokenEstimates(), RequestMetricsCache(metrics)
        work_ledger = WorkLedger(shared, 0, ledger)
        tracker = CapacityTracker(shared, work_ledger)
        builder = RoutingTableBuilder(
            cache, "", lambda: b"s" * 32, lambda one: tracker.update_view(one, int(self.now_s * 1000))
        )
        self.active = ActiveTable(RoutingTable(EMPTY, builder, None, 0.0))
        self.registry = RequestRegistry(shared, 0, [], self.soon.append, clock)
        events = DeploymentEvents(cast(EventSpool, self.spool), clock)
        health = PassiveHealthChecker(self.active, shared, 0, events, self.registry, clock)
        accounts = CapacityAccounts(
            shared, 0, work_ledger, tracker, metrics.histogram("fleetgate_ttft_prediction_error_seconds", {})
        )
        rows = cast(Any, type("Journal", (), {"add": staticmethod(self.journal.append)}))
        outcomes = OutcomeRecorder(metrics, AccessLog("off", 0), None, rows, estimates, cache)
        self.transport = FakeTransport(self._name_of)
        attempts = AttemptServices(clock, self._spawn, self.transport, self.active, ledger, self.registry)
        effects = AttemptEffects(health, cast(PoisonDetector, NoPoison()), accounts, outcomes)
        placer = Placer(self.active, ledger, accounts, self.registry, health, None)
        defaults = ResponseDefaults(lambda error, request_id: self.errors.append(error))
        ids = (b"r%d" % number for number in count(1))
        self.services = HandlerServices(ids, defaults, placer, self.registry, attempts, effects)
        deployments = tuple(deployment(NAMES[at], 8001 + at, at, **each) for at in range(count_))
        chat = gateway(*NAMES[:count_], default=True, **fields)
        snapshot = Snapshot(version=1, made_at_s=0.0, gateways=(chat,), deployments=deployments)
        tracker.use(snapshot)
        table = RoutingTable(snapshot, builder, self.active.current, self.now_s)
        for one in table.deployments.values():
            tracker.update_view(one, int(self.now_s * 1000))
        self.active.replace(table)
        self._health = health

    def _name_of(self, pool: ConnectionPool) -> str:
        found = [one for one in self.active.current.deployments.values() if one.endpoints[0].pool is pool]
        return found[0].spec.name

    @staticmethod
    def _spawn(work: Coroutine[None, None, None]) -> None:
        raise AssertionError("nothing is suspicious, so nothing runs beside")

    def clock(self) -> float:
        """The worker's clock."""
        return self.now_s

    def request(self, stream: bool = True, **fields: Any) -> FakeClient:
        """A request begins."""
        asked = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream, **fields}
        body = msgspec.json.encode(asked)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: chat.test\r\ncontent-length: %d\r\n\r\n" % len(body)
        table = self.active.current
        context = RequestContext(parse_request_head(head), table, table.gateways[b"chat.test"], ANONYMOUS, b"")
        operation = context.operation
        assert operation is not None
        info = context.protocol.parse_request(body)
        received = ReceivedRequest(context, operation, context.gateway.routes["m"], info, body)
        client = FakeClient()
        client.handler = RequestHandler(self.services, client, received)
        self.handlers.append(client.handler)
        client.handler.start()
        self.run()
        return client

    def run(self) -> None:
        """What was to be done soon."""
        while self.soon:
            self.soon.pop(0)()
        assert not self.errors, self.errors

    def wait(self, seconds: float, step_s: float = TICK_S) -> None:
        """Let time pass, with the ticks of requests and health."""
        for number in range(1, round(seconds / step_s) + 1):
            self.now_s += step_s
            is_second = number % round(1.0 / step_s) == 0
            self.registry.tick(self.now_s, {} if is_second else None)
            self._health.tick(self.now_s, is_second)
            if self.registry.has_waiting:
                self.registry.wake()
            self.run()

    def sent_to(self) -> list[str]:
        """The Deployments that something was sent to, in order."""
        return [response.name for response in self.transport.sent]

    def settlements(self) -> list[tuple[str, str]]:
        """The Deployment and the outcome of each attempt. Every attempt is begun once and settled once."""
        rows = [msgspec.json.decode(line) for line in self.journal]
        begun = {row["id"]: row["deployment"] for row in rows if row["t"] == "i"}
        settled = [row for row in rows if row["t"] == "s"]
        assert sorted(row["id"] for row in settled) == sorted(begun), "begun and settled are not the same attempts"
        return [(begun[row["id"]], row["outcome"]) for row in settled]

    def is_idle(self) -> bool:
        """Whether no request holds anything."""
        shared, cells = self.shared, (WorkCell.PENDING_TOKENS, WorkCell.SEQUENCES, WorkCell.KV_TOKENS)
        slots = range(len(NAMES))
        return not (
            any(shared.in_flight_total(slot) for slot in slots)
            or self.registry.in_flight
            or self.registry.has_waiting
            or any(one.in_flight or one.trials for one in self.active.current.endpoints.values())
            or any(shared.work[slot * WORK_CELLS + cell] for slot in slots for cell in cells)
            or any(shared.milliunits)
        )
