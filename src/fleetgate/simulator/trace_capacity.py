"""Capacity for a trace: the largest steady rate of its mix that one replica serves inside the SLO, times replicas.

Each Deployment is measured alone with evenly spaced arrivals, so a router that refuses the most expensive requests can
exceed this capacity. A rate counts as served if 95 % of the requests are inside the SLO. Only shapes that an idle
replica serves in 0.9 of the SLO are used.
"""

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from random import Random

from fleetgate.core.capacity.units import ttft_target_s
from fleetgate.core.model import Profile, Slo
from fleetgate.simulator.fleet import SimulatedFleet
from fleetgate.simulator.serving.replica import ReplicaJob, SimulatedReplica
from fleetgate.simulator.serving.world import Arrival

INSIDE_SHARE_MIN = 0.95
IDLE_SHARE_MAX = 0.9
SHAPES_MAX = 1500  # sampled from the trace by seed; the rate then differs by less than 2 % between seeds
RATE_PRECISION = 0.01
OUTPUT_WEIGHT = 8.0  # the work of an output token, in prompt tokens


def work_of(arrivals: Sequence[Arrival]) -> list[float]:
    """Each request's work, relative to the trace's mean."""
    raw = [arrival.prompt_tokens + OUTPUT_WEIGHT * arrival.output_tokens for arrival in arrivals]
    mean = sum(raw) / len(raw)
    return [work / mean for work in raw]


def fastest_idle_s(fleet: SimulatedFleet, prompt_tokens: int) -> float:
    """TTFT of the fleet's fastest replica when idle; no TTFT target is below it."""
    return min(idle_ttft_s(d.profile, prompt_tokens) for d in fleet.deployments if d.profile is not None)


def idle_ttft_s(profile: Profile, prompt_tokens: int) -> float:
    """TTFT of an idle replica, without the network."""
    return prompt_tokens / profile.prefill_tokens_per_s


def capacities_rps(
    fleet: SimulatedFleet, arrivals: Sequence[Arrival], seed: int, progress: Callable[[str], None] = lambda name: None
) -> dict[str, float]:
    """Requests/s of the trace's mix that each Deployment serves, by name; 0 if it is too slow for every request."""
    shapes = Random(seed).sample(list(arrivals), min(len(arrivals), SHAPES_MAX))
    measured: dict[Profile, float] = {}
    found = {}
    for deployment in fleet.deployments:
        progress(deployment.name)
        profile = deployment.profile
        assert profile is not None
        if profile not in measured:
            measured[profile] = _replica_rps(profile, fleet, shapes)
        found[deployment.name] = measured[profile] * len(deployment.endpoints)
    return found


def _replica_rps(profile: Profile, fleet: SimulatedFleet, shapes: Sequence[Arrival]) -> float:
    slo = fleet.slo
    targets = [ttft_target_s(slo, s.prompt_tokens, fastest_idle_s(fleet, s.prompt_tokens)) for s in shapes]
    step_s = profile.base_s + profile.per_sequence_s
    if step_s > IDLE_SHARE_MAX * slo.tpot_s:
        return 0.0
    fitting = [
        (shape, target_s)
        for shape, target_s in zip(shapes, targets, strict=True)
        if idle_ttft_s(profile, shape.prompt_tokens) <= IDLE_SHARE_MAX * target_s
    ]
    if not fitting:
        return 0.0

    def serves(rate_rps: float) -> bool:
        return inside_share(profile, slo, fitting, rate_rps) >= INSIDE_SHARE_MIN

    low, high = 0.0, 0.5
    while serves(high) and high < 1e4:
        low, high = high, high * 2.0
    while high - low > RATE_PRECISION * high:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if serves(middle) else (low, middle)
    return low


def inside_share(profile: Profile, slo: Slo, shapes: Sequence[tuple[Arrival, float]], rate_rps: float) -> float:
    """The share of evenly spaced requests that one replica serves inside the SLO."""
    replica, jobs, first_s, inside = (
        SimulatedReplica(profile),
        dict[int, tuple[Arrival, float, float]](),
        dict[int, float](),
        0,
    )
    heap: list[tuple[float, int]] = []

    def run_until(now_s: float) -> int:
        good = 0
        while heap and heap[0][0] <= now_s:
            at_s, version = heappop(heap)
            if version != replica.version:
                continue
            firsts, ended = replica.advance()
            if not replica.idle:
                heappush(heap, (replica.ends_s, replica.version))
            for job in firsts:
                first_s[job.index] = at_s
            for job in ended:
                _, sent_s, target_s = jobs.pop(job.index)
                began_s = first_s.pop(job.index)
                tpot_s = (at_s - began_s) / max(1, job.output_tokens - 1)
                good += began_s - sent_s <= target_s and tpot_s <= slo.tpot_s
        return good

    for index, (shape, target_s) in enumerate(shapes):
        now_s = index / rate_rps
        inside += run_until(now_s)
        jobs[index] = (shape, now_s, target_s)
        version = replica.version
        replica.push(ReplicaJob(index, shape.prompt_tokens, shape.output_tokens), now_s)
        if replica.version != version:
            heappush(heap, (replica.ends_s, replica.version))
    inside += run_until(float("inf"))
    return inside / len(shapes)
