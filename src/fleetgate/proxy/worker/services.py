"""What a worker's requests share: tables, ledger, metrics, the log, and one sweep in place of timers."""

import asyncio
import os
import time
from collections.abc import Callable, Coroutine
from email.utils import formatdate
from pathlib import Path

from fleetgate.core.admission.ledger import Ledger
from fleetgate.core.admission.request_queue import QueueEntry
from fleetgate.core.admission.work_ledger import WorkLedger
from fleetgate.core.capacity.token_estimates import TokenEstimates
from fleetgate.core.exchange import Failure, Outcome
from fleetgate.core.routing.decision_record import RecordedEnd
from fleetgate.ipc.event_spool import EventRecord, EventSpool
from fleetgate.ipc.log import Level, Log
from fleetgate.ipc.shared_memory import COUNTER_CELLS, EndpointSignal, SharedMemory, WorkerCell
from fleetgate.ipc.usage_journal import UsageJournal
from fleetgate.proxy.downstream.authenticator import Authenticator
from fleetgate.proxy.downstream.client_connection import ClientConnection
from fleetgate.proxy.downstream.policy_notices import PolicyNotices
from fleetgate.proxy.health.passive_health import PassiveHealthChecker
from fleetgate.proxy.health.poison_detector import PoisonDetector
from fleetgate.proxy.overload.overload_manager import OverloadManager
from fleetgate.proxy.request import deadlines as watching
from fleetgate.proxy.request.handler import RequestHandler
from fleetgate.proxy.request.reservation import Reservation
from fleetgate.proxy.request.termination import REVOKED, terminate
from fleetgate.proxy.request.usage import UsageRecorder
from fleetgate.proxy.routing.capacity_tracker import CapacityTracker, change_sentence
from fleetgate.proxy.routing.routing_table import (
    DeploymentState,
    ModelRouteState,
    RoutingTable,
    RoutingTableBuilder,
)
from fleetgate.proxy.snapshot.key_validity import KeyValidity
from fleetgate.proxy.telemetry.access_log import NO_DEPLOYMENT, OUTCOME_BYTES, REQUEST_LINE, AccessLog
from fleetgate.proxy.telemetry.decision_log import DecisionLog
from fleetgate.proxy.telemetry.line_log import DroppedLines, LineLog
from fleetgate.proxy.telemetry.metrics import WorkerMetrics
from fleetgate.proxy.telemetry.request_metrics import RequestMetrics, TokenEstimateError
from fleetgate.proxy.transport.connection_pool import IDLE_MAX_S
from fleetgate.proxy.transport.response_relay import ResponseRelay
from fleetgate.proxy.worker.config import WorkerConfig

SWEEP_S = 0.05  # HOTPATH.md rule 10
WATCH_EVERY = 20  # sweeps: stalls, idle connections and clients' deadlines once a second
LOOKS_MAX = 4  # requests of a row that may look for room in turn, so that one that is too long blocks none
LOAD_FRESH_MS = 3_000  # three polls: an older signal counts as no signal, not as "full"
TROUBLE_EVERY_S = 5.0  # one line for each Deployment in trouble, not one for each request


class Hub:
    """One worker's shared state. It is made before the loop runs and changed only by the loop's thread."""

    def __init__(
        self, config: WorkerConfig, board: SharedMemory, ledger: Ledger, log: AccessLog, keeper: Authenticator
    ) -> None:
        self.config = config
        self.board = board
        self.ledger = ledger
        self.log = log
        self.process_log = Log(worker=config.index)
        self.gatekeeper = keeper
        self.books = WorkLedger(board, config.index, ledger)
        self.learning = CapacityTracker(board, self.books)
        self.lengths = TokenEstimates()
        self.notices = PolicyNotices()
        self.ward = PassiveHealthChecker(self)
        self.suspects = PoisonDetector(self)
        self.spool = EventSpool(Path(config.data_dir))
        self.journal = UsageJournal(Path(config.data_dir), self.say)
        self.accounts = UsageRecorder(self.journal)
        self.recorder = DecisionLog(config.record, config.region, config.index) if config.record != "off" else None
        self.corrects_limits: Callable[[], bool] = lambda: False  # whether this worker does it for all
        self.telemetry = WorkerMetrics(board, config.index)
        self.estimates = {kind: TokenEstimateError(self.telemetry, kind) for kind in ("prompt", "output")}
        logs: dict[str, LineLog | Log] = {"access": log, "process": self.process_log}
        if self.recorder is not None:
            logs["record"] = self.recorder.log
        self.dropped_lines = DroppedLines(self.telemetry, logs)
        self.ttft_error = self.telemetry.histogram("fleetgate_ttft_prediction_error_seconds", {})
        self.loop: asyncio.AbstractEventLoop
        self.clock: Callable[[], float] = time.monotonic
        self.tables: RoutingTable
        self.maker: RoutingTableBuilder
        self.conversations: dict[RequestHandler, None] = {}
        self.waiters: dict[QueueEntry, RequestHandler] = {}
        self.draining = False
        self.date_line = b""
        self._date_s = 0
        self._connections: dict[ClientConnection, None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._denied: dict[tuple[int, str], int] = {}
        self._trouble: dict[str, float] = {}
        self._sweeps = 0
        self.guards = OverloadManager(self)
        self.freshness: KeyValidity
        self.others = [worker for worker in range(config.workers) if worker != config.index]  # who may wait for room
        # Unique over workers, restarts and machines without a system call for each request. HOTPATH.md rule 12.
        self._id_prefix = b"req_%x%x%b" % (time.time_ns() // 1_000_000, os.getpid(), os.urandom(3).hex().encode())
        self._ids = 0

    # --- small services ---

    def next_id(self) -> bytes:
        """A request id."""
        self._ids += 1
        return b"%b%08x" % (self._id_prefix, self._ids)

    def epoch_s(self) -> float:
        """The calendar's clock, for what has an expiry date."""
        return time.time()

    def say(self, sentence: str) -> None:
        """A line in the process's own log."""
        self.process_log.info("worker", sentence)

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run something beside the loop's callbacks; kept referenced until it ends."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- connections and waiting ---

    def connected(self, client: ClientConnection) -> None:
        """A client connected."""
        self._connections[client] = None
        self.board.set(self.config.index, WorkerCell.CONNECTIONS, len(self._connections))

    def disconnected(self, client: ClientConnection) -> None:
        """A client's connection ended."""
        self._connections.pop(client, None)
        self.board.set(self.config.index, WorkerCell.CONNECTIONS, len(self._connections))

    @property
    def connections(self) -> list[ClientConnection]:
        """All client connections."""
        return list(self._connections)

    def count_waiting(self, lane: ModelRouteState, change: int) -> None:
        """A request began or ceased to wait."""
        board, index = self.board, self.config.index
        board.waiting[lane.site.gateway.slot * board.workers + index] += change
        board.set(index, WorkerCell.WAITING, board.get(index, WorkerCell.WAITING) + change)

    def room_freed(self, slot: int) -> None:
        """A Deployment has a place again: whoever waits may look, here first, then in the other workers."""
        if self.waiters:
            self.loop.call_soon(self.wake)
        for worker in self.others:
            if self.board.get(worker, WorkerCell.WAITING):
                try:
                    os.write(self.config.wake_fds[worker], b"\x01")
                except OSError:  # its pipe is full, so it is awake, or it is gone
                    pass

    def wake(self) -> None:
        """Let the first of each Lane's waiting requests look for a place, and the next, until one finds none."""
        lanes = {conversation.lane: None for conversation in self.waiters.values()}
        for lane in lanes:
            found = True
            while found:  # each that finds a place changes what there is for the next
                found = any(self.waiters[ticket].look_again() for ticket in lane.room.next_entries(LOOKS_MAX))

    def tally(self, slot: int, cell: int) -> None:
        """Count something of a Deployment for the correction of its limit."""
        board = self.board
        board.deployment_counters[(slot * board.workers + self.config.index) * COUNTER_CELLS + cell] += 1

    def prompt_done(self) -> None:
        """An engine turned to its next prompt: somebody who waits may have room now."""
        if self.waiters:
            self.loop.call_soon(self.wake)

    def learn(self, conversation: RequestHandler, booking: Reservation, relay: ResponseRelay) -> None:
        """An answer ended as it should: what it tells of lengths and speed."""
        model, usage, wanting = conversation.lane.model, relay.usage, conversation.wanting
        prompt_tokens = 0
        output_tokens = relay.event_count if relay.stream else 0
        if usage is not None:
            prompt_tokens = usage.prompt_tokens or usage.input_tokens or 0
            output_tokens = usage.completion_tokens or usage.output_tokens or output_tokens
            self.lengths.record_prompt(model, len(conversation.body), prompt_tokens)
            if wanting is not None:
                self.estimates["prompt"].record(wanting.need.prompt_tokens, prompt_tokens)
                self.estimates["output"].record(wanting.need.output_tokens, output_tokens)
        if output_tokens:
            self.lengths.record_output(model, conversation.request.key.name, output_tokens)
        now_s = self.clock()
        if wanting is not None:
            need = wanting.need
            booking.measured(prompt_tokens or need.prompt_tokens, output_tokens or need.output_tokens, now_s)
        booking.ended(output_tokens if relay.stream else 0, conversation.lane.desk.slo.tpot_s, now_s)

    # --- Snapshots ---

    def use(self, tables: RoutingTable) -> None:
        """Take a new Snapshot; running requests end on the old one, waiting ones move over."""
        waiting = list(self.waiters.values())
        kept = set(tables.peers.values())
        for peer in self.tables.peers.values():
            if peer not in kept:
                peer.retire()
        before, self.tables = self.tables, tables
        if self.recorder is not None:
            tables.record_decisions()
        self.learning.use(tables.snapshot)
        tables.fit_changed = lambda place: self.learning.renew(place, int(self.clock() * 1000))
        self._renew_places(int(self.clock() * 1000), whole=True)
        self.ward.use(before, tables)
        self.board.set(self.config.index, WorkerCell.SNAPSHOT_VERSION, tables.version)
        self.board.set(self.config.index, WorkerCell.SNAPSHOT_AT_MS, int(tables.snapshot.made_at_s * 1000))
        self._end_with_their_keys(before, tables)
        for conversation in waiting:
            conversation.change_lane()

    def _end_with_their_keys(self, before: RoutingTable, tables: RoutingTable) -> None:
        """Running requests whose key is gone, where it says that they go with it. FAULTS.md row 64."""
        gone = {key.id for key in before.keys.values() if key.kill_streams and key.id not in tables.keys}
        if gone:
            for conversation in [one for one in self.conversations if one.request.key.id in gone]:
                terminate(conversation, REVOKED)

    # --- what requests read ---

    def _renew_places(self, now_ms: int, whole: bool = False) -> None:
        """What requests read of Deployments: where health or load changed, and of all once a second."""
        board = self.board
        for place in self.tables.places.values():
            before = place.fit, place.foreign, place.paused
            if place.fit < 1.0:
                place.renew_fit(now_ms / 1000)
            if len(place.peers) == 1:
                slot = place.peers[0].endpoint.slot
                fresh = now_ms - board.signal(slot, EndpointSignal.LOAD_SEEN_MS) < LOAD_FRESH_MS
                place.foreign = board.signal(slot, EndpointSignal.FOREIGN) if fresh else 0
            if place.cools_until_s:
                self.ward.cool(place, now_ms / 1000)
            if whole:
                place.prefills = all(
                    board.signal(peer.endpoint.slot, EndpointSignal.PREFILL) == 1 for peer in place.peers
                )
                marks = {board.signal(peer.endpoint.slot, EndpointSignal.TOKENS) for peer in place.peers}
                place.token_mark = marks.pop() if len(marks) == 1 and not marks <= {0, 1} else 0
            if whole or (place.fit, place.foreign, place.paused) != before:
                self.learning.renew(place, now_ms)

    def resumed(self, conversation: RequestHandler) -> None:
        """An answer that broke off goes on elsewhere."""
        resumption = conversation.resumption
        assert resumption is not None
        self.accounts.went_on(conversation)
        labels = {"gateway": conversation.lane.site.gateway.name, "way": str(resumption.way)}
        self.telemetry.cells[self.telemetry.counter("fleetgate_resumes_total", labels)] += 1

    def note_upstream_trouble(self, place: DeploymentState, what: str) -> None:
        """Log why a Deployment cannot be reached, once in a while."""
        now_s, name = self.clock(), place.deployment.name
        if now_s - self._trouble.get(name, float("-inf")) < TROUBLE_EVERY_S:
            return
        self._trouble[name] = now_s
        self.log.event(Level.WARNING, "upstream_trouble", what[:300], deployment=name)

    # --- the books ---

    def record(self, conversation: RequestHandler) -> None:
        """Count and log a request that has ended."""
        now_s = conversation.seen_s
        if self.recorder is not None:
            _record_end(self.recorder, conversation)
        cells = self.telemetry.cells
        relay, place, lane = conversation.relay, conversation.last_place, conversation.lane
        started_s, first_s = conversation.started_s, conversation.first_s
        outcome = conversation.exchange.outcome or Outcome.FAILED
        meters = self._meters_of(lane, place)
        cells[meters.outcomes.get(outcome) or meters.outcome(outcome)] += 1
        if conversation.status == 503:
            self.telemetry.add("fleetgate_unavailable_total", {"gateway": lane.site.gateway.name})
        prompt_tokens = output_tokens = 0
        if first_s:
            meters.ttft.observe(first_s - started_s)
            meters.duration.observe(now_s - started_s)
        if relay is not None:
            usage = relay.usage
            if relay.stream and relay.event_count > 1:
                tpot_s = (now_s - first_s) / (relay.event_count - 1)
                meters.tpot.observe(tpot_s)
                if outcome is Outcome.OK and place is not None and not conversation.exchange.resumes:
                    place.pulse.record_stream(tpot_s)
            if usage is not None:
                prompt_tokens = usage.prompt_tokens or usage.input_tokens or 0
                output_tokens = usage.completion_tokens or usage.output_tokens or 0
                if outcome is Outcome.OK and output_tokens and not relay.stream and place is not None:
                    place.pulse.record_response((now_s - conversation.sent_s) / output_tokens)
                cells[meters.prompt_tokens] += prompt_tokens
                cells[meters.output_tokens] += output_tokens
        if self.log.on:
            self.log.add(
                REQUEST_LINE
                % (
                    int(time.time() * 1000),
                    conversation.request_id,
                    lane.log_names,
                    conversation.request.key_json,
                    place.log_names if place is not None else NO_DEPLOYMENT,
                    conversation.status,
                    OUTCOME_BYTES[outcome],
                    conversation.attempts,
                    b"true" if conversation.ask.stream else b"false",
                    int((first_s - started_s) * 1e6) if first_s else 0,
                    int((now_s - started_s) * 1e6),
                    conversation.written,
                    prompt_tokens,
                    output_tokens,
                )
            )

    def count_failure(self, lane: ModelRouteState, place: DeploymentState, failure: Failure) -> None:
        """Count an attempt that was lost."""
        meters = lane.meters.get(place.slot)
        if meters is not None:
            self.telemetry.cells[meters.failure(failure)] += 1

    def _meters_of(self, lane: ModelRouteState, place: DeploymentState | None) -> RequestMetrics:
        if place is None:
            return self.maker.meters(lane.site.gateway.name, "", "")
        known = lane.meters.get(place.slot)
        if known is not None:
            return known
        return self.maker.meters(lane.site.gateway.name, place.deployment.name, place.deployment.region)

    def record_denied(self, status: int, code: str) -> None:
        """Count a request that never reached routing. Shape: `code` is one of ours, so the label is bounded."""
        index = self._denied.get((status, code))
        if index is None:
            labels = {"status": str(status), "code": code}
            index = self._denied[status, code] = self.telemetry.counter("fleetgate_denied_total", labels)
        self.telemetry.cells[index] += 1
        self.log.denied(status, code)

    # --- the sweep ---

    def sweep(self) -> None:
        """Every 50 ms: deadlines, the log, what other workers ejected. Cost: 10 µs and 0.1 µs a request in flight."""
        now_s = self.clock()
        self._sweeps += 1
        self.board.set(self.config.index, WorkerCell.HEARTBEAT_MS, int(now_s * 1000))
        epoch = int(time.time())
        if epoch != self._date_s:
            self._date_s = epoch
            self.date_line = b"date: %b\r\n" % formatdate(epoch, usegmt=True).encode()
        watch = self._sweeps % WATCH_EVERY == 0
        furthest: dict[int, int] = {}
        for conversation in list(self.conversations):
            if watch:
                watching.watch(conversation, now_s, furthest)
            if conversation.deadline_s <= now_s:
                conversation.overdue(now_s)
            elif conversation.lane.hedges:
                watching.perhaps_hedge(conversation, now_s)
        self.ward.sweep(now_s, watch)
        self._renew_places(int(now_s * 1000), watch)
        if self.waiters:
            self.wake()  # a breaker's back-off may be over; no event tells
        if watch:
            self._learn_from_the_last_second(furthest, now_s)
            self._look_at_journal(now_s)
            self.dropped_lines.publish()
            for client in self.connections:
                if client.deadline_s <= now_s:
                    client.overdue(now_s)
            for peer in self.tables.peers.values():
                peer.close_idle(now_s - IDLE_MAX_S)
                peer.follow_name(now_s)
        self.log.flush()
        if self.recorder is not None:
            self.recorder.log.flush()

    def _look_at_journal(self, now_s: float) -> None:
        journal, index = self.journal, self.config.index
        journal.check(now_s)
        self.board.set(index, WorkerCell.JOURNAL_SHORT, journal.is_short)
        self.board.set(index, WorkerCell.ROWS_LOST, journal.lost)

    def _learn_from_the_last_second(self, furthest: dict[int, int], now_s: float) -> None:
        """Paces from our own streams; limits, in the one worker that does it for all, from what all have counted."""
        self.learning.learn_paces(furthest, now_s)
        if not self.corrects_limits():
            return
        for name, change in self.learning.correct_limits(int(now_s * 1000)):
            sentence = change_sentence(name, change)
            self.spool.add(EventRecord("Deployment", name, sentence))
            self.log.event(Level.INFO, "limit_changed", sentence, deployment=name)


def _record_end(recorder: DecisionLog, conversation: RequestHandler) -> None:
    relay, wanting, place, lane = (
        conversation.relay,
        conversation.wanting,
        conversation.last_place,
        conversation.lane,
    )
    if wanting is None:
        return  # it never asked for a place
    usage = relay.usage if relay is not None else None
    prompt_tokens: float = 0
    output_tokens: float = relay.event_count if relay is not None and relay.stream else 0
    if usage is not None:
        prompt_tokens = usage.prompt_tokens or usage.input_tokens or 0
        output_tokens = usage.completion_tokens or usage.output_tokens or output_tokens
    first_s, started_s, key = conversation.first_s, conversation.started_s, conversation.request.key.name
    identity = recorder.identity(conversation.request_id, lane.site.gateway.name, lane.model, key)
    recorder.ended(
        RecordedEnd(
            **identity._asdict(),
            outcome=(conversation.exchange.outcome or Outcome.FAILED).value,
            duration_s=conversation.seen_s - started_s,
            ttft_s=first_s - started_s if first_s else 0.0,
            prompt_tokens=prompt_tokens or wanting.need.prompt_tokens,
            output_tokens=output_tokens or wanting.need.output_tokens,
            estimated=not (prompt_tokens and output_tokens),
            deployment=place.deployment.name if place is not None else "",
        )
    )
