"""The capacity of Deployments: estimated from traffic, and published as views that requests read.

Every worker learns speeds from its own streams. The worker that probes corrects limits and margins from the counts of
all workers and writes them to shared memory, where the others read them.
"""

from collections.abc import Iterable, Mapping
from math import ceil
from zlib import crc32

import msgspec

from fleetgate.core.admission.work_ledger import WorkLedger
from fleetgate.core.capacity.adaptive_limit import EngineLoad, LimitChange, ViolationCounts
from fleetgate.core.capacity.deployment_view import DeploymentView, EndpointCapacity
from fleetgate.core.capacity.latency_model import LatencyPrediction
from fleetgate.core.capacity.online_estimate import UNKNOWN_BATCH, DecodeProgress, Observation, OnlineEstimate
from fleetgate.core.model import Deployment, Slo, Snapshot
from fleetgate.ipc.shared_memory import LEARNED_CELLS, TALLY_CELLS, EndpointSignal, LearnedCell, SharedMemory
from fleetgate.proxy.routing.deployment_state import DeploymentState

FRESH_MS = 3_000  # three probes: an older signal counts as no signal


def strictest_slos(snapshot: Snapshot) -> dict[str, Slo]:
    """The SLO of each Deployment: the strictest value of each field over all Gateways that list it."""
    found: dict[str, Slo] = {}
    for gateway in snapshot.gateways:
        slo = gateway.slo or Slo()
        for upstream in gateway.upstreams:
            known = found.get(upstream.deployment, slo)
            found[upstream.deployment] = Slo(
                ttft_s=min(known.ttft_s, slo.ttft_s),
                ttft_s_per_1k_tokens=min(known.ttft_s_per_1k_tokens, slo.ttft_s_per_1k_tokens),
                tpot_s=min(known.tpot_s, slo.tpot_s),
            )
    return found


def capacity_mark(deployment: Deployment, slo: Slo) -> int:
    """A checksum of what the speed and limit of a Deployment depend on.

    Every process computes the same mark from the same Snapshot; it is never 0.
    """
    engines = sum(endpoint.engines for endpoint in deployment.endpoints)
    relevant = (deployment.profile, deployment.concurrency_max, deployment.engine, deployment.units, engines, slo)
    return crc32(msgspec.json.encode(relevant)) + 1


class CapacityTracker:
    """The capacity estimates of one worker. Shape: `views` are read by requests, by Deployment slot."""

    def __init__(self, shared: SharedMemory, work_ledger: WorkLedger) -> None:
        self._shared = shared
        self._work_ledger = work_ledger
        self._estimates: dict[str, OnlineEstimate] = {}
        self._by_slot: dict[int, OnlineEstimate] = {}
        self._marks: dict[str, int] = {}
        self.views: dict[int, DeploymentView] = {}

    def use(self, snapshot: Snapshot) -> None:
        """Use a new Snapshot; the estimates of unchanged Deployments stay."""
        slos = strictest_slos(snapshot)
        kept, self._estimates = self._estimates, {}
        for deployment in snapshot.deployments:
            slo, known = slos.get(deployment.name, Slo()), kept.get(deployment.name)
            if known is not None and capacity_mark(known.deployment, known.slo) == capacity_mark(deployment, slo):
                known.deployment = deployment
                self._estimates[deployment.name] = known
            else:
                self._estimates[deployment.name] = OnlineEstimate(deployment, slo)
        self._by_slot = {estimate.deployment.slot: estimate for estimate in self._estimates.values()}
        self._marks = {
            name: capacity_mark(estimate.deployment, estimate.slo) for name, estimate in self._estimates.items()
        }

    def record_first_token(self, slot: int, prediction: LatencyPrediction, observed_s: float) -> None:
        """Record that a first token came so long after its request was sent."""
        if slot in self._by_slot:
            self._by_slot[slot].record_first_token(prediction, observed_s)

    def record_end(self, slot: int, units: float, held_s: float) -> None:
        """Record that a response of so many CU ended well, so long after its request was sent."""
        if slot in self._by_slot:
            self._by_slot[slot].record_end(units, held_s)

    def update_view(self, deployment: DeploymentState, now_ms: int) -> None:
        """Compute the view of a Deployment that requests read until the next update. Cost: 6 µs."""
        spec, now_s = deployment.spec, now_ms / 1000
        estimate = self._estimates[spec.name]
        endpoints = tuple(
            EndpointCapacity(endpoint.spec.slot, endpoint.spec.engines)
            for endpoint in deployment.healthy_endpoints(now_s)
        )
        rtts_us = (self._shared.signal(endpoint.endpoint_slot, EndpointSignal.RTT_US) for endpoint in endpoints)
        rtt_s = min(rtts_us, default=0) / 1e6
        at = spec.slot * LEARNED_CELLS
        seen_ms, limit, margin_permille, _, mark = self._shared.learned[at : at + LEARNED_CELLS]
        if now_ms - seen_ms < FRESH_MS and mark == self._marks[spec.name]:
            estimate.adaptive_limit.limit = float(limit)
            estimate.adaptive_limit.margin = margin_permille / 1000
        observation = Observation(
            deployment.health, endpoints, deployment.external_in_flight, rtt_s, paused=deployment.paused
        )
        view = estimate.view(observation)
        share = deployment.limit_share(now_s)
        if share < 1.0:
            limit = max(1, ceil(share * (view.limit or deployment.in_flight_peak)))
            view = msgspec.structs.replace(view, limit=limit)
        self.views[spec.slot] = view
        deployment.limit = view.limit

    def learn_speeds(self, furthest: Mapping[int, int], now_s: float) -> None:
        """Learn speeds, once a second. Shape: `furthest`: by Endpoint slot, the most tokens of a stream since then."""
        self._guess_slots()
        for estimate in self._estimates.values():
            view = self.views.get(estimate.deployment.slot)
            if view is not None:
                progress = [
                    DecodeProgress(endpoint, furthest.get(endpoint.endpoint_slot, 0)) for endpoint in view.endpoints
                ]
                estimate.learn_speed(self._work_ledger, progress, now_s)

    def _guess_slots(self) -> None:
        """Assume that engines of unknown limit have as many slots as the others, so that they can be compared."""
        unknown = [estimate for estimate in self._estimates.values() if estimate.deployment.profile is None]
        known = [
            estimate.adaptive_limit.limit / estimate.engines for estimate in unknown if estimate.adaptive_limit.limit
        ]
        for estimate in unknown:
            estimate.slots_guess = sum(known) / len(known) if known else UNKNOWN_BATCH

    def correct_limits(self, now_ms: int) -> Iterable[tuple[str, LimitChange]]:
        """Correct limits, once a second in the worker that probes. Returns the changes, by Deployment."""
        learned = self._shared.learned
        for name, estimate in self._estimates.items():
            slot = estimate.deployment.slot
            counts, load = self._counts(slot), self._engine_load(estimate.deployment, now_ms)
            change = estimate.learn_limit(counts, self._shared.in_flight_total(slot), load, now_ms / 1000)
            at, limit = slot * LEARNED_CELLS, estimate.adaptive_limit
            learned[at + LearnedCell.LIMIT] = int(limit.limit)
            learned[at + LearnedCell.MARGIN_PERMILLE] = int(limit.margin * 1000)
            learned[at + LearnedCell.MILLIUNITS] = int(estimate.units * 1000)
            learned[at + LearnedCell.OF] = self._marks[name]
            learned[at + LearnedCell.SEEN_MS] = now_ms
            if change is not None:
                yield name, change

    def _counts(self, slot: int) -> ViolationCounts:
        at = slot * self._shared.workers * TALLY_CELLS
        cells = self._shared.deployment_counters[at : at + self._shared.workers * TALLY_CELLS]
        return ViolationCounts(*(sum(cells[cell::TALLY_CELLS]) for cell in range(TALLY_CELLS)))

    def _engine_load(self, deployment: Deployment, now_ms: int) -> EngineLoad:
        shared = self._shared
        fresh = [
            endpoint.slot
            for endpoint in deployment.endpoints
            if now_ms - shared.signal(endpoint.slot, EndpointSignal.LOAD_SEEN_MS) < FRESH_MS
        ]
        if not fresh:
            return EngineLoad()
        kv_share = max(shared.signal(slot, EndpointSignal.KV_PERMILLE) for slot in fresh) / 1000
        waiting = sum(max(0, shared.signal(slot, EndpointSignal.WAITING)) for slot in fresh)
        return EngineLoad(waiting, kv_share if kv_share >= 0 else None)


def limit_change_message(deployment: str, change: LimitChange) -> str:
    """The sentence of the log and the Event about a changed limit."""
    before, after = str(change.before or "none"), str(change.after or "none")
    return f"The limit of Deployment {deployment} went from {before} to {after}: {change.because}."
