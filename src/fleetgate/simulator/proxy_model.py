"""The production balancer in the simulator: the core of the live proxy, driven by a simulated clock."""

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
from fleetgate.ipc.shared_memory import TALLY_CELLS, DeploymentCounter, SharedMemory
from fleetgate.simulator.fleet import MODEL, SimulatedFleet
from fleetgate.simulator.serving.world import Arrival, World

WAITING_TRIED_MAX = 4  # queue entries tried when capacity frees up, so that a large one does not block the others


@dataclass(slots=True, eq=False)
class OpenRequest:
    """One request that has not ended."""

    arrival: Arrival
    shape: RequestShape
    queue_entry: QueueEntry | None = None
    reservation: WorkReservation | None = None
    prediction: LatencyPrediction | None = None
    target_s: float = 0.0
    sent_s: float = 0.0
    first_s: float = 0.0
    tokens_seen: int = 0
    tried: tuple[int, ...] = ()


class ProxyModel:
    """One proxy with its own ledger, estimates and queue."""

    def __init__(self, proxies: "ProxyFleet", index: int, region: str) -> None:
        self.index = index
        self.proxies = proxies
        self.memory = SharedMemory(memoryview(bytearray(SharedMemory.bytes_needed(1))), 1)
        self.work_ledger = WorkLedger(self.memory, 0, Ledger(self.memory, 0))
        self.scheduler = Scheduler(proxies.gateway, model_routes(proxies.gateway, proxies.snapshot, region)[MODEL])
        self.slo = proxies.gateway.slo or Slo()
        self.estimates = {
            deployment.slot: OnlineEstimate(deployment, self.slo) for deployment in proxies.snapshot.deployments
        }
        self.token_estimates = TokenEstimates()
        self.affinity = PrefixAffinity()
        self.open: dict[int, OpenRequest] = {}
        self.waiting: dict[QueueEntry, OpenRequest] = {}
        self.views: dict[int, DeploymentView] = {}

    def on_arrival(self, arrival: Arrival, now_s: float) -> None:
        """Send the request, let it wait, or refuse it."""
        warm = self.affinity.find(arrival.blocks)
        shape = RequestShape(
            prompt_tokens=arrival.prompt_tokens,
            output_tokens=self.token_estimates.output_tokens(MODEL, arrival.key),
            warm_slot=warm.endpoint_slot,
            warm_tokens=warm.blocks * BLOCK_TOKENS,
        )
        request = OpenRequest(arrival, shape)
        if not self.scheduler.queue and self._try(request, now_s):
            return
        self._wait(request, now_s)

    def on_first_token(self, arrival: Arrival, now_s: float) -> None:
        """Learn from the measured TTFT, and release the prompt's work."""
        request = self.open[arrival.index]
        request.first_s = now_s
        assert request.reservation is not None
        if request.prediction is not None:
            slot = request.reservation.slot
            self.estimates[slot].record_first_token(request.prediction, now_s - request.sent_s)
            if now_s - arrival.at_s > request.target_s:
                self._count(slot, DeploymentCounter.TTFT_LATE)
        request.reservation = self.work_ledger.first_token(request.reservation, now_s)
        self._try_waiting(now_s)

    def on_finished(self, arrival: Arrival, now_s: float) -> None:
        """Count the response, and release its reservation."""
        request = self.open.pop(arrival.index)
        reservation = request.reservation
        assert reservation is not None
        tokens = arrival.output_tokens
        self.token_estimates.record_output(MODEL, arrival.key, tokens)
        self._count(reservation.slot, DeploymentCounter.ENDED)
        if tokens > 1 and (now_s - request.first_s) / (tokens - 1) > self.slo.tpot_s:
            self._count(reservation.slot, DeploymentCounter.TPOT_LATE)
        self.work_ledger.settle(reservation)
        self._try_waiting(now_s)

    def on_failed(self, arrival: Arrival, failure: str, now_s: float) -> None:
        """Move the request to another Deployment if the client has received nothing yet."""
        request = self.open.pop(arrival.index)
        reservation = request.reservation
        assert reservation is not None
        if failure == "full":
            self._count(reservation.slot, DeploymentCounter.REFUSED)
        self.work_ledger.settle(reservation)
        if request.first_s:
            self.proxies.world.refuse(arrival, "interrupted", now_s)
            return
        request.tried = (*request.tried, reservation.slot)
        request.reservation = None
        if not self._try(request, now_s):
            self._wait(request, now_s, ahead=True)

    def on_wake(self, now_s: float) -> None:
        """Try waiting requests, and refuse those past their deadline."""
        self._try_waiting(now_s)
        for queue_entry, request in list(self.waiting.items()):
            if queue_entry.deadline_s <= now_s:
                self._leave_queue(request)
                self.proxies.world.refuse(request.arrival, "capacity_exhausted", now_s)

    def _try(self, request: OpenRequest, now_s: float) -> bool:
        schedule_request = ScheduleRequest(request.shape, now_s - request.arrival.at_s)
        placed = self.scheduler.place(schedule_request, self.views, self.work_ledger, now_s, request.tried)
        if isinstance(placed, Rejection):
            return False
        request.reservation, request.prediction = placed.reservation, placed.prediction
        request.target_s, request.sent_s = placed.target_s, now_s
        self.open[request.arrival.index] = request
        self.affinity.record(request.arrival.blocks, placed.reservation.endpoint_slot)
        self.proxies.world.send(request.arrival, placed.reservation.endpoint_slot, now_s)
        return True

    def _wait(self, request: OpenRequest, now_s: float, ahead: bool = False) -> None:
        admission = self.scheduler.gateway.admission
        deadline_s = self.scheduler.queue_deadline_s(request.shape, request.arrival.at_s, self.views)
        if len(self.waiting) >= admission.queue_max:
            self.proxies.world.refuse(request.arrival, "queue_full", now_s)
            return
        if deadline_s <= now_s:
            self.proxies.world.refuse(request.arrival, "capacity_exhausted", now_s)
            return
        queue_entry = QueueEntry(deadline_s, request.arrival.key, request.shape.units)
        request.queue_entry = queue_entry
        self.waiting[queue_entry] = request
        self.scheduler.queue.join(queue_entry, ahead)
        self.proxies.world.wake_at(deadline_s)

    def _leave_queue(self, request: OpenRequest, served: bool = False) -> None:
        queue_entry, request.queue_entry = request.queue_entry, None
        if queue_entry is not None:
            del self.waiting[queue_entry]
            self.scheduler.queue.leave(queue_entry, served)

    def _try_waiting(self, now_s: float) -> None:
        for queue_entry in self.scheduler.queue.next_entries(WAITING_TRIED_MAX):
            request = self.waiting[queue_entry]
            if self._try(request, now_s):
                self._leave_queue(request, served=True)

    def _count(self, slot: int, counter: DeploymentCounter) -> None:
        self.memory.deployment_counters[slot * TALLY_CELLS + counter] += 1

    def counts(self, slot: int) -> ViolationCounts:
        """This proxy's counts for a Deployment."""
        at = slot * TALLY_CELLS
        return ViolationCounts(*self.memory.deployment_counters[at : at + TALLY_CELLS])

    def refresh_views(self, now_s: float) -> None:
        """Update the views that requests read until the next tick, from the estimates and the leases."""
        for slot, estimate in self.estimates.items():
            lease = self.proxies.leases[self.index, slot].now(now_s)
            up = [endpoint for endpoint in estimate.deployment.endpoints if self.proxies.world.is_up(endpoint.slot)]
            leased = up if lease.slots else []  # without leased slots it is unusable; a limit of 0 would mean no limit
            endpoints = tuple(EndpointCapacity(endpoint.slot, endpoint.engines * lease.share) for endpoint in leased)
            rtt_s = self.proxies.world.rtt_s(self.index, slot)
            view = estimate.view(Observation(1.0 if endpoints else 0.0, endpoints, rtt_s=rtt_s))
            self.views[slot] = msgspec.structs.replace(view, limit=lease.slots)

    def learn_speeds(self, now_s: float) -> None:
        """Learn decode speeds from the progress of open streams since the last tick."""
        progress: dict[int, int] = {}
        for request in self.open.values():
            if not request.first_s or request.reservation is None:
                continue
            tokens = self.proxies.world.tokens_received(request.arrival, now_s)
            if request.tokens_seen:
                slot = request.reservation.endpoint_slot
                progress[slot] = max(progress.get(slot, 0), tokens - request.tokens_seen)
            request.tokens_seen = tokens
        for slot, estimate in self.estimates.items():
            steps = [
                DecodeProgress(endpoint, progress.get(endpoint.endpoint_slot, 0))
                for endpoint in self.views[slot].endpoints
            ]
            estimate.learn_speed(self.work_ledger, steps, now_s)

    def lease_demand(self, slot: int) -> LeaseDemand:
        """This proxy's demand for the next leases of a Deployment."""
        in_flight = self.work_ledger.ledger.in_flight(slot)
        return LeaseDemand(in_flight, in_flight + len(self.waiting))


class ProxyFleet:
    """All proxies of one simulated fleet, and the owner of their leases."""

    def __init__(self, world: World, fleet: SimulatedFleet, strategy: str) -> None:
        self.world = world
        self.gateway = msgspec.structs.replace(fleet.gateway, strategy=strategy)
        self.snapshot = msgspec.structs.replace(fleet.snapshot, gateways=(self.gateway,))
        self.leases: dict[tuple[int, int], Lease] = {}
        self.proxies = [ProxyModel(self, index, region) for index, region in enumerate(world.proxy_regions)]
        self.changes: list[str] = []
        self._divide_leases(0.0)
        for proxy in self.proxies:
            proxy.refresh_views(0.0)

    def on_arrival(self, arrival: Arrival, now_s: float) -> None:
        """Pass a request to its proxy."""
        self.proxies[arrival.proxy].on_arrival(arrival, now_s)

    def on_first_token(self, arrival: Arrival, now_s: float) -> None:
        """Pass its first token to its proxy."""
        self.proxies[arrival.proxy].on_first_token(arrival, now_s)

    def on_finished(self, arrival: Arrival, now_s: float) -> None:
        """Pass its last token to its proxy."""
        self.proxies[arrival.proxy].on_finished(arrival, now_s)

    def on_failed(self, arrival: Arrival, failure: str, now_s: float) -> None:
        """Pass the failure of its attempt to its proxy."""
        self.proxies[arrival.proxy].on_failed(arrival, failure, now_s)

    def on_wake(self, now_s: float) -> None:
        """Wake every proxy."""
        for proxy in self.proxies:
            proxy.on_wake(now_s)

    def on_tick(self, now_s: float) -> None:
        """Once a second: learn speeds, correct limits, divide leases."""
        for proxy in self.proxies:
            proxy.learn_speeds(now_s)
        for deployment in self.snapshot.deployments:
            self._correct_limit(deployment, now_s)
        self._divide_leases(now_s)
        for proxy in self.proxies:
            proxy.refresh_views(now_s)
        self.on_wake(now_s)

    def limit_of(self, slot: int) -> int:
        """The current limit of a Deployment over all proxies."""
        return int(self.proxies[0].estimates[slot].adaptive_limit.limit)

    def _correct_limit(self, deployment: Deployment, now_s: float) -> None:
        slot = deployment.slot
        owner = self.proxies[0].estimates[slot]
        counts = [proxy.counts(slot) for proxy in self.proxies]
        total = ViolationCounts(*(sum(column) for column in zip(*map(msgspec.structs.astuple, counts), strict=True)))
        in_flight = sum(proxy.work_ledger.ledger.in_flight(slot) for proxy in self.proxies)
        change = owner.learn_limit(total, in_flight, self._engine_load(deployment), now_s)
        for proxy in self.proxies[1:]:
            proxy.estimates[slot].adaptive_limit = owner.adaptive_limit
        if change is not None:
            self.changes.append(f"{now_s:.0f} s {deployment.name}: {change.before} to {change.after}: {change.because}")

    def _engine_load(self, deployment: Deployment) -> EngineLoad:
        slots = [endpoint.slot for endpoint in deployment.endpoints]
        waiting = sum(self.world.waiting(slot) for slot in slots)
        return EngineLoad(waiting, max((self.world.kv_share(slot) for slot in slots), default=0.0))

    def _divide_leases(self, now_s: float) -> None:
        for deployment in self.snapshot.deployments:
            slot = deployment.slot
            demand = {str(proxy.index): proxy.lease_demand(slot) for proxy in self.proxies}
            limit = self.limit_of(slot)
            slots = divide(limit, demand, deployment.name)
            for proxy in self.proxies:
                count = slots[str(proxy.index)]
                self.leases[proxy.index, slot] = Lease(count, count / max(1, limit), now_s + LEASE_S)
