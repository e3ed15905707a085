"""What a worker learns of Deployments from its traffic, and what its requests read of it.

Speeds are learned by every worker from its own streams. Limits and margins are corrected by one, the prober's, from
what all have counted; the others read them off the board.
"""

from collections.abc import Iterable, Mapping
from math import ceil
from typing import TYPE_CHECKING
from zlib import crc32

import msgspec

from fleetgate.core.admission.work_ledger import WorkLedger
from fleetgate.core.capacity.adaptive_limit import EngineLoad, LimitChange, ViolationCounts
from fleetgate.core.capacity.deployment_view import DeploymentView, EndpointCapacity
from fleetgate.core.capacity.latency_model import LatencyPrediction
from fleetgate.core.capacity.online_estimate import UNKNOWN_BATCH, DecodeProgress, Observation, OnlineEstimate
from fleetgate.core.model import Deployment, Slo, Snapshot
from fleetgate.ipc.shared_memory import COUNTER_CELLS, LEARNED_CELLS, EndpointSignal, LearnedCell, SharedMemory

if TYPE_CHECKING:
    from fleetgate.proxy.routing.routing_table import DeploymentState

FRESH_MS = 3_000  # three polls: an older signal counts as no signal


def strictest_slos(snapshot: Snapshot) -> dict[str, Slo]:
    """The SLO that each Deployment is held to: of all Gateways that list it, the strictest in each part."""
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


def mark_of(deployment: Deployment, slo: Slo) -> int:
    """Tells apart what was learned of a Deployment before and after a change that bears on speed or limit.

    Every process works out the same mark from the same Snapshot; 0 is nobody's.
    """
    engines = sum(endpoint.engines for endpoint in deployment.endpoints)
    bearing = (deployment.profile, deployment.concurrency_max, deployment.engine, deployment.units, engines, slo)
    return crc32(msgspec.json.encode(bearing)) + 1


class CapacityTracker:
    """The Estimates of one worker, by Deployment name, and the Outlooks that requests read, by slot."""

    def __init__(self, board: SharedMemory, books: WorkLedger) -> None:
        self._board = board
        self._books = books
        self._estimates: dict[str, OnlineEstimate] = {}
        self._by_slot: dict[int, OnlineEstimate] = {}
        self._marks: dict[str, int] = {}
        self.outlooks: dict[int, DeploymentView] = {}

    def use(self, snapshot: Snapshot) -> None:
        """Take a new Snapshot; what was learned of Deployments that stay the same stays."""
        slos = strictest_slos(snapshot)
        kept, self._estimates = self._estimates, {}
        for deployment in snapshot.deployments:
            slo, known = slos.get(deployment.name, Slo()), kept.get(deployment.name)
            if known is not None and mark_of(known.deployment, known.slo) == mark_of(deployment, slo):
                known.deployment = deployment
                self._estimates[deployment.name] = known
            else:
                self._estimates[deployment.name] = OnlineEstimate(deployment, slo)
        self._by_slot = {estimate.deployment.slot: estimate for estimate in self._estimates.values()}
        self._marks = {name: mark_of(one.deployment, one.slo) for name, one in self._estimates.items()}

    def saw_first(self, slot: int, fit: LatencyPrediction, observed_s: float) -> None:
        """A first token came so long after its request was sent."""
        if slot in self._by_slot:
            self._by_slot[slot].record_first_token(fit, observed_s)

    def saw_end(self, slot: int, units: float, held_s: float) -> None:
        """An answer ended as it should, of so many CU, so long after its request was sent."""
        if slot in self._by_slot:
            self._by_slot[slot].record_end(units, held_s)

    def renew(self, place: "DeploymentState", now_ms: int) -> None:
        """Work out what requests read of a Deployment until the next look. Cost: 6 µs."""
        deployment = place.deployment
        estimate = self._estimates[deployment.name]
        seats = tuple(
            EndpointCapacity(peer.endpoint.slot, peer.endpoint.engines) for peer in place.fit_peers(now_ms / 1000)
        )
        rtt_s = min((self._board.signal(seat.endpoint_slot, EndpointSignal.RTT_US) for seat in seats), default=0) / 1e6
        at = deployment.slot * LEARNED_CELLS
        seen_ms, limit, margin_permille, _, mark = self._board.learned[at : at + LEARNED_CELLS]
        if now_ms - seen_ms < FRESH_MS and mark == self._marks[deployment.name]:
            estimate.adaptive_limit.limit = float(limit)
            estimate.adaptive_limit.margin = margin_permille / 1000
        outlook = estimate.view(Observation(place.fit, seats, place.foreign, rtt_s, place.paused))
        share = place.share(now_ms / 1000)
        if share < 1.0:
            outlook = msgspec.structs.replace(outlook, limit=max(1, ceil(share * (outlook.limit or place.carried))))
        self.outlooks[deployment.slot] = outlook
        place.limit = outlook.limit

    def learn_paces(self, furthest: Mapping[int, int], now_s: float) -> None:
        """Once a second. Shape: `furthest` is the most tokens that one stream of an Endpoint got since then."""
        self._guess_places()
        for estimate in self._estimates.values():
            outlook = self.outlooks.get(estimate.deployment.slot)
            if outlook is not None:
                steps = [DecodeProgress(seat, furthest.get(seat.endpoint_slot, 0)) for seat in outlook.endpoints]
                estimate.learn_speed(self._books, steps, now_s)

    def _guess_places(self) -> None:
        """An engine of which no limit is known yet is taken to hold what the others hold: so they can be compared."""
        unknown = [estimate for estimate in self._estimates.values() if estimate.deployment.profile is None]
        known = [one.adaptive_limit.limit / one.engines for one in unknown if one.adaptive_limit.limit]
        for estimate in unknown:
            estimate.slots_guess = sum(known) / len(known) if known else UNKNOWN_BATCH

    def correct_limits(self, now_ms: int) -> Iterable[tuple[str, LimitChange]]:
        """Once a second, in the prober's worker: every limit that moved, by Deployment, with the reason."""
        for name, estimate in self._estimates.items():
            slot = estimate.deployment.slot
            counts, signals = self._counts(slot), self._signals(estimate.deployment, now_ms)
            change = estimate.learn_limit(counts, self._board.in_flight_total(slot), signals, now_ms / 1000)
            at, limits = slot * LEARNED_CELLS, estimate.adaptive_limit
            self._board.learned[at + LearnedCell.LIMIT] = int(limits.limit)
            self._board.learned[at + LearnedCell.MARGIN_PERMILLE] = int(limits.margin * 1000)
            self._board.learned[at + LearnedCell.MILLIUNITS] = int(estimate.units * 1000)
            self._board.learned[at + LearnedCell.OF] = self._marks[name]
            self._board.learned[at + LearnedCell.SEEN_MS] = now_ms
            if change is not None:
                yield name, change

    def _counts(self, slot: int) -> ViolationCounts:
        at = slot * self._board.workers * COUNTER_CELLS
        cells = self._board.deployment_counters[at : at + self._board.workers * COUNTER_CELLS]
        return ViolationCounts(*(sum(cells[cell::COUNTER_CELLS]) for cell in range(COUNTER_CELLS)))

    def _signals(self, deployment: Deployment, now_ms: int) -> EngineLoad:
        board = self._board
        fresh = [
            endpoint.slot
            for endpoint in deployment.endpoints
            if now_ms - board.signal(endpoint.slot, EndpointSignal.LOAD_SEEN_MS) < FRESH_MS
        ]
        if not fresh:
            return EngineLoad()
        kv_share = max(board.signal(slot, EndpointSignal.KV_PERMILLE) for slot in fresh) / 1000
        waiting = sum(max(0, board.signal(slot, EndpointSignal.WAITING)) for slot in fresh)
        return EngineLoad(waiting, kv_share if kv_share >= 0 else None)


def change_sentence(deployment: str, change: LimitChange) -> str:
    """A limit that moved, as one sentence for the log and the Event."""
    before, after = str(change.before or "none"), str(change.after or "none")
    return f"The limit of Deployment {deployment} went from {before} to {after}: {change.because}."
