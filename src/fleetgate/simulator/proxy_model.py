"""The production balancer in the simulator: the core of the live proxy, with a simulated clock around it."""

from dataclasses import dataclass

import msgspec

from fleetgate.core.admission.lease import LEASE_S, Lease, LeaseDemand, divide
from fleetgate.core.admission.ledger import Ledger
from fleetgate.core.admission.request_queue import QueueEntry
from fleetgate.core.admission.work_ledger import WorkLedger, WorkReservation
from fleetgate.core.capacity.adaptive_limit import EngineLoad, ViolationCounts
from fleetgate.core.capacity.deployment_view import DeploymentView, EndpointCapacity
from fleetgate.core.capacity.latency_model import LatencyPrediction, RequestShape
from fleetgate.core.capacity.online_estimate import DecodeProgress, Observation, OnlineEstimate
from fleetgate.core.capacity.token_estimates import TokenEstimates
from fleetgate.core.model import Deployment, Slo
from fleetgate.core.routing.prefix_affinity import BLOCK_TOKENS, PrefixAffinity
from fleetgate.core.routing.route import Rejection, model_routes
from fleetgate.core.routing.scheduler import Scheduler, ScheduleRequest
from fleetgate.ipc.shared_memory import COUNTER_CELLS, DeploymentCounter, SharedMemory
from fleetgate.simulator.fleet import MODEL, SimulatedFleet
from fleetgate.simulator.world import Arrival, World

LOOKS_MAX = 4  # requests of a row that may try when a place comes free, so that one that is too long blocks none


@dataclass(slots=True, eq=False)
class OpenRequest:
    """One request on its way."""

    arrival: Arrival
    need: RequestShape
    ticket: QueueEntry | None = None
    hold: WorkReservation | None = None
    fit: LatencyPrediction | None = None
    target_s: float = 0.0
    sent_s: float = 0.0
    first_s: float = 0.0
    tokens_seen: int = 0
    tried: tuple[int, ...] = ()


class ProxyModel:
    """One proxy: its own books, lessons and row of waiting requests."""

    def __init__(self, shell: "ProxyFleet", index: int, region: str) -> None:
        self.index = index
        self.shell = shell
        self.board = SharedMemory(memoryview(bytearray(SharedMemory.bytes_needed(1))), 1)
        self.books = WorkLedger(self.board, 0, Ledger(self.board, 0))
        self.desk = Scheduler(shell.gateway, model_routes(shell.gateway, shell.snapshot, region)[MODEL])
        self.slo = shell.gateway.slo or Slo()
        self.estimates = {
            deployment.slot: OnlineEstimate(deployment, self.slo) for deployment in shell.snapshot.deployments
        }
        self.lengths = TokenEstimates()
        self.affinity = PrefixAffinity()
        self.open: dict[int, OpenRequest] = {}
        self.waiting: dict[QueueEntry, OpenRequest] = {}
        self.shares: dict[int, float] = dict.fromkeys(self.estimates, 1.0 / shell.proxies_count)
        self.outlooks: dict[int, DeploymentView] = {}

    def arrive(self, arrival: Arrival, now_s: float) -> None:
        """Place it, let it wait, or refuse it."""
        warm = self.affinity.find(arrival.blocks)
        need = RequestShape(
            prompt_tokens=arrival.prompt_tokens,
            output_tokens=self.lengths.output_tokens(MODEL, arrival.key),
            warm_slot=warm.endpoint_slot,
            warm_tokens=warm.blocks * BLOCK_TOKENS,
        )
        request = OpenRequest(arrival, need)
        if not self.desk.queue and self._try(request, now_s):
            return
        self._wait(request, now_s)

    def first_token(self, arrival: Arrival, now_s: float) -> None:
        """The prompt is through."""
        request = self.open[arrival.index]
        request.first_s = now_s
        assert request.hold is not None
        if request.fit is not None:
            self.estimates[request.hold.slot].record_first_token(request.fit, now_s - request.sent_s)
            if now_s - arrival.at_s > request.target_s:
                self._tally(request.hold.slot, DeploymentCounter.TTFT_LATE)
        request.hold = self.books.first_token(request.hold, now_s)
        self._wake(now_s)

    def finished(self, arrival: Arrival, now_s: float) -> None:
        """The answer ended."""
        request = self.open.pop(arrival.index)
        hold = request.hold
        assert hold is not None
        tokens = arrival.output_tokens
        self.lengths.record_output(MODEL, arrival.key, tokens)
        self._tally(hold.slot, DeploymentCounter.ENDED)
        if tokens > 1 and (now_s - request.first_s) / (tokens - 1) > self.slo.tpot_s:
            self._tally(hold.slot, DeploymentCounter.TPOT_LATE)
        self.books.settle(hold)
        self._wake(now_s)

    def failed(self, arrival: Arrival, failure: str, now_s: float) -> None:
        """An attempt was lost: it moves on while nothing was sent to the client yet."""
        request = self.open.pop(arrival.index)
        hold = request.hold
        assert hold is not None
        if failure == "full":
            self._tally(hold.slot, DeploymentCounter.REFUSED)
        self.books.settle(hold)
        if request.first_s:
            self.shell.world.refuse(arrival, "interrupted", now_s)
            return
        request.tried = (*request.tried, hold.slot)
        request.hold = None
        if not self._try(request, now_s):
            self._wait(request, now_s, ahead=True)

    def woken(self, now_s: float) -> None:
        """A deadline passed, or time alone made room."""
        self._wake(now_s)
        for ticket, request in list(self.waiting.items()):
            if ticket.deadline_s <= now_s:
                self._leave(request)
                self.shell.world.refuse(request.arrival, "capacity_exhausted", now_s)

    def _try(self, request: OpenRequest, now_s: float) -> bool:
        wish = ScheduleRequest(request.need, now_s - request.arrival.at_s)
        placed = self.desk.place(wish, self.outlooks, self.books, now_s, request.tried)
        if isinstance(placed, Rejection):
            return False
        request.hold, request.fit, request.target_s, request.sent_s = (
            placed.reservation,
            placed.prediction,
            placed.target_s,
            now_s,
        )
        self.open[request.arrival.index] = request
        self.affinity.record(request.arrival.blocks, placed.reservation.endpoint_slot)
        self.shell.world.send(request.arrival, placed.reservation.endpoint_slot, now_s)
        return True

    def _wait(self, request: OpenRequest, now_s: float, ahead: bool = False) -> None:
        admission = self.desk.gateway.admission
        deadline_s = self.desk.queue_deadline_s(request.need, request.arrival.at_s, self.outlooks)
        if len(self.waiting) >= admission.queue_max:
            self.shell.world.refuse(request.arrival, "queue_full", now_s)
            return
        if deadline_s <= now_s:
            self.shell.world.refuse(request.arrival, "capacity_exhausted", now_s)
            return
        ticket = QueueEntry(deadline_s, request.arrival.key, request.need.units)
        request.ticket = ticket
        self.waiting[ticket] = request
        self.desk.queue.join(ticket, ahead)
        self.shell.world.wake_at(deadline_s)

    def _leave(self, request: OpenRequest, served: bool = False) -> None:
        ticket, request.ticket = request.ticket, None
        if ticket is not None:
            del self.waiting[ticket]
            self.desk.queue.leave(ticket, served)

    def _wake(self, now_s: float) -> None:
        for ticket in self.desk.queue.next_entries(LOOKS_MAX):
            request = self.waiting[ticket]
            if self._try(request, now_s):
                self._leave(request, served=True)

    def _tally(self, slot: int, cell: DeploymentCounter) -> None:
        self.board.deployment_counters[slot * COUNTER_CELLS + cell] += 1

    def counts(self, slot: int) -> ViolationCounts:
        """What this proxy counted of a Deployment."""
        at = slot * COUNTER_CELLS
        return ViolationCounts(*self.board.deployment_counters[at : at + COUNTER_CELLS])

    def renew(self, now_s: float) -> None:
        """What requests read until the next tick, from the lessons and the leases."""
        for slot, estimate in self.estimates.items():
            lease = self.shell.leases[self.index, slot].now(now_s)
            up = [endpoint for endpoint in estimate.deployment.endpoints if self.shell.world.is_up(endpoint.slot)]
            leased = up if lease.slots else []  # without a slot it is not ours to use; a limit of 0 would mean no limit
            seats = tuple(EndpointCapacity(endpoint.slot, endpoint.engines * lease.share) for endpoint in leased)
            rtt_s = self.shell.world.rtt_s(self.index, slot)
            outlook = estimate.view(Observation(1.0 if seats else 0.0, seats, rtt_s=rtt_s))
            self.outlooks[slot] = msgspec.structs.replace(outlook, limit=lease.slots)

    def learn(self, now_s: float) -> None:
        """Once a second: how far the streams came."""
        furthest: dict[int, int] = {}
        for request in self.open.values():
            if not request.first_s or request.hold is None:
                continue
            tokens = self.shell.world.tokens_received(request.arrival, now_s)
            if request.tokens_seen:
                at = request.hold.endpoint_slot
                furthest[at] = max(furthest.get(at, 0), tokens - request.tokens_seen)
            request.tokens_seen = tokens
        for slot, estimate in self.estimates.items():
            steps = [
                DecodeProgress(seat, furthest.get(seat.endpoint_slot, 0)) for seat in self.outlooks[slot].endpoints
            ]
            estimate.learn_speed(self.books, steps, now_s)

    def wanted(self, slot: int) -> LeaseDemand:
        """What this proxy asks of a Deployment's next leases."""
        in_flight = self.books.ledger.in_flight(slot)
        return LeaseDemand(in_flight, in_flight + len(self.waiting))


class ProxyFleet:
    """All proxies of one simulated fleet, and the owner of their leases."""

    def __init__(self, world: World, fleet: SimulatedFleet, strategy: str) -> None:
        self.world = world
        self.gateway = msgspec.structs.replace(fleet.gateway, strategy=strategy)
        self.snapshot = msgspec.structs.replace(fleet.snapshot, gateways=(self.gateway,))
        self.proxies_count = len(world.proxy_regions)
        self.leases: dict[tuple[int, int], Lease] = {}
        self.proxies = [ProxyModel(self, index, region) for index, region in enumerate(world.proxy_regions)]
        self.changes: list[str] = []
        self._lease(0.0)
        for proxy in self.proxies:
            proxy.renew(0.0)

    def arrive(self, arrival: Arrival, now_s: float) -> None:
        """A request came to its proxy."""
        self.proxies[arrival.proxy].arrive(arrival, now_s)

    def first_token(self, arrival: Arrival, now_s: float) -> None:
        """Its first token came."""
        self.proxies[arrival.proxy].first_token(arrival, now_s)

    def finished(self, arrival: Arrival, now_s: float) -> None:
        """Its last token came."""
        self.proxies[arrival.proxy].finished(arrival, now_s)

    def failed(self, arrival: Arrival, failure: str, now_s: float) -> None:
        """The attempt was lost."""
        self.proxies[arrival.proxy].failed(arrival, failure, now_s)

    def woken(self, now_s: float) -> None:
        """A wake-up that was asked for."""
        for proxy in self.proxies:
            proxy.woken(now_s)

    def tick(self, now_s: float) -> None:
        """Once a second: learn, correct limits, divide leases."""
        for proxy in self.proxies:
            proxy.learn(now_s)
        for deployment in self.snapshot.deployments:
            self._correct(deployment, now_s)
        self._lease(now_s)
        for proxy in self.proxies:
            proxy.renew(now_s)
        self.woken(now_s)

    def limit_of(self, slot: int) -> int:
        """The limit of a Deployment now, over all proxies."""
        return int(self.proxies[0].estimates[slot].adaptive_limit.limit)

    def _correct(self, deployment: Deployment, now_s: float) -> None:
        slot = deployment.slot
        owner = self.proxies[0].estimates[slot]
        counts = [proxy.counts(slot) for proxy in self.proxies]
        total = ViolationCounts(*(sum(column) for column in zip(*map(msgspec.structs.astuple, counts), strict=True)))
        in_flight = sum(proxy.books.ledger.in_flight(slot) for proxy in self.proxies)
        change = owner.learn_limit(total, in_flight, self._signals(deployment), now_s)
        for proxy in self.proxies[1:]:
            proxy.estimates[slot].adaptive_limit = owner.adaptive_limit
        if change is not None:
            self.changes.append(f"{now_s:.0f} s {deployment.name}: {change.before} to {change.after}: {change.because}")

    def _signals(self, deployment: Deployment) -> EngineLoad:
        slots = [endpoint.slot for endpoint in deployment.endpoints]
        waiting = sum(self.world.waiting(slot) for slot in slots)
        return EngineLoad(waiting, max((self.world.kv_share(slot) for slot in slots), default=0.0))

    def _lease(self, now_s: float) -> None:
        for deployment in self.snapshot.deployments:
            slot = deployment.slot
            wanted = {str(proxy.index): proxy.wanted(slot) for proxy in self.proxies}
            limit = self.limit_of(slot)
            slots = divide(limit, wanted, deployment.name)
            for proxy in self.proxies:
                count = slots[str(proxy.index)]
                self.leases[proxy.index, slot] = Lease(count, count / max(1, limit), now_s + LEASE_S)
