"""The reference: greedy, but with the truth about every engine and the length of every answer, ours too.

It does not know what comes later. A request goes where it ends first among the engines at which it keeps its targets
and breaks nobody else's; where there is none it waits, and is refused when its TTFT can no longer be kept.
"""

from typing import NamedTuple

from fleetgate.core.capacity.latency_model import CHUNK_TOKENS
from fleetgate.core.capacity.units import ttft_target_s
from fleetgate.simulator.baseline import Baseline, TrueLoad
from fleetgate.simulator.replica import Boundary, ReplicaJob, SimulatedReplica
from fleetgate.simulator.trace_capacity import fastest_idle_s, idle_ttft_s
from fleetgate.simulator.world import Arrival, SimulatedEngine, World

TPOT_SHARE_MAX = 0.98  # the rest is for the error of looking at whole steps
LOOKS_MAX = 8  # waiting requests that may try when an engine changes, so that a long one blocks none


class OracleView(NamedTuple):
    """The truth about one engine when the step under way ends, with what is still on its way there.

    Shape: `coming` are prompts that no step has begun yet, with what of them is to be computed; `lives` are the steps
    that everybody still takes, those to come included.
    Units: `prompt_tokens` are still to be computed; `kv_tokens` are or will be reserved.
    """

    engine: int
    boundary: Boundary
    prompt_tokens: int
    kv_tokens: int
    coming: list[tuple[int, int]]
    lives: list[int]


class OracleRequest(NamedTuple):
    """Somebody at an engine: steps left, seconds to spare, and prompt tokens that come between the steps."""

    left: int
    spare_s: float
    between: int
    identity: int


class OraclePrediction(NamedTuple):
    """How a request would do at one engine if nothing more came."""

    end_s: float
    ttft_s: float
    tpot_s: float
    prompt_tokens: int
    view: OracleView


class Oracle(Baseline):
    """Admits by the truth; it has admission, unlike the other baselines."""

    sheds = True

    def __init__(self, world: World, truth: TrueLoad) -> None:
        super().__init__(world, truth)
        self.slo = truth.fleet.slo
        self._tightest: dict[int, int] = {}  # by engine: whose TPOT stood in the way last
        self._flying: list[dict[int, Arrival]] = [{} for _ in world.engines]
        self._waiting: dict[int, tuple[Arrival, float, float]] = {}  # with TTFT target and deadline

    def arrive(self, arrival: Arrival, now_s: float) -> None:
        """Send it, let it wait, or refuse it."""
        target_s = self._target_s(arrival)
        engine = self._best(arrival, target_s - (now_s - arrival.at_s), now_s, self._views(now_s))
        if engine >= 0:
            self._send(arrival, engine, now_s)
            return
        least_s = min(
            idle_ttft_s(engine.replica.profile, arrival.prompt_tokens) + engine.rtts_s[arrival.proxy]
            for engine in self.world.engines
        )
        deadline_s = arrival.at_s + target_s - least_s
        if deadline_s <= now_s:
            self.world.refuse(arrival, "capacity_exhausted", now_s)
            return
        self._waiting[arrival.index] = (arrival, target_s, deadline_s)
        self.world.wake_at(deadline_s)

    def first_token(self, arrival: Arrival, now_s: float) -> None:
        """Its prompt is computed, so others may fit."""
        self._retry(arrival.replica, now_s)

    def finished(self, arrival: Arrival, now_s: float) -> None:
        """Its place is free."""
        super().finished(arrival, now_s)
        self._flying[arrival.replica].pop(arrival.index, None)
        self._retry(arrival.replica, now_s)

    def failed(self, arrival: Arrival, failure: str, now_s: float) -> None:
        """It is no longer on its way there."""
        self._flying[arrival.replica].pop(arrival.index, None)
        super().failed(arrival, failure, now_s)

    def woken(self, now_s: float) -> None:
        """Somebody's TTFT is about to be lost: the last try."""
        for arrival, target_s, deadline_s in list(self._waiting.values()):
            if deadline_s > now_s:
                continue
            del self._waiting[arrival.index]
            engine = self._best(arrival, target_s - (now_s - arrival.at_s), now_s, self._views(now_s))
            if engine >= 0:
                self._send(arrival, engine, now_s)
            else:
                self.world.refuse(arrival, "capacity_exhausted", now_s)

    def _send(self, arrival: Arrival, engine: int, now_s: float) -> None:
        self._flying[engine][arrival.index] = arrival
        self.in_flight[engine] += 1
        self.world.send(arrival, engine, now_s)

    def _retry(self, engine: int, now_s: float) -> None:
        if not self._waiting or not self.world.is_up(engine):
            return
        view = self._view(engine, now_s)
        for arrival, target_s, _ in list(self._waiting.values())[:LOOKS_MAX]:
            if self._best(arrival, target_s - (now_s - arrival.at_s), now_s, [view]) >= 0:
                del self._waiting[arrival.index]
                self._send(arrival, engine, now_s)
                view = self._view(engine, now_s)

    def _target_s(self, arrival: Arrival) -> float:
        return ttft_target_s(self.slo, arrival.prompt_tokens, fastest_idle_s(self.fleet, arrival.prompt_tokens))

    def _views(self, now_s: float) -> list[OracleView]:
        return [self._view(engine, now_s) for engine in self.up()]

    def _best(self, arrival: Arrival, ttft_left_s: float, now_s: float, views: list[OracleView]) -> int:
        """The engine where it ends first, keeps its own targets and breaks nobody's; −1 for none."""
        prospects = [self._prospect(arrival, view, now_s) for view in views]
        prospects.sort(key=lambda prospect: (prospect.end_s, prospect.view.engine))
        for prospect in prospects:
            inside = prospect.ttft_s <= ttft_left_s and prospect.tpot_s <= TPOT_SHARE_MAX * self.slo.tpot_s
            if inside and not self._broken_by(arrival, prospect, now_s):
                return prospect.view.engine
        if self.sheds:
            return -1
        # What is lost anyway goes where it costs others least: in overload that is one engine, given up.
        return min(prospects, key=lambda prospect: self._broken_by(arrival, prospect, now_s)).view.engine

    def _view(self, engine: int, now_s: float) -> OracleView:
        truth, flying = self.world.engines[engine], self._flying[engine]
        replica = truth.replica
        boundary = replica.boundary(now_s)
        steps = boundary.steps
        lives = [last - steps for last, _, _ in replica.decoding]
        lives += [job.output_tokens - 1 for job in replica.prefilling]
        tokens, kv_tokens = sum([job.prefill_left for job in replica.prefilling]), replica.kv_used
        for index in [index for index in flying if index in truth.jobs]:
            del flying[index]
        coming = []
        requests = [(job.prompt_tokens, job.output_tokens, job.blocks) for job in replica.queue]
        requests += [(other.prompt_tokens, other.output_tokens, other.blocks) for other in flying.values()]
        for prompt_tokens, output_tokens, blocks in requests:
            uncached = prompt_tokens - replica.cached_tokens(blocks, prompt_tokens)
            coming.append((uncached, output_tokens))
            tokens += uncached
            kv_tokens += prompt_tokens + output_tokens
            lives.append(output_tokens - 1)
        return OracleView(engine, boundary, tokens - boundary.prompt_tokens, kv_tokens, coming, lives)

    def _people(self, view: OracleView, now_s: float) -> list[OracleRequest]:
        """Everybody at an engine, with what is left of their time when all that is there already is done."""
        truth, tpot_s = self.world.engines[view.engine], self.slo.tpot_s
        replica, boundary = truth.replica, view.boundary
        # Steps left, seconds allowed for them, prompt tokens before them, and who it is (-1 where it has not begun).
        people: list[tuple[int, float, int, int]] = []
        for last, identity, job in replica.decoding:
            people.append((last - boundary.steps, self._allowed_s(truth, job, now_s) - boundary.at_s, 0, identity))
        before = -boundary.prompt_tokens
        prompts = [(job.prefill_left, job.output_tokens) for job in replica.prefilling]
        for uncached, output_tokens in prompts + view.coming:
            before += uncached
            people.append((output_tokens - 1, tpot_s * (output_tokens - 1), before if before > 0 else 0, -1))
        people.sort()
        found, done, count = [], 0, len(people)
        for at, (left, allowed_s, prompt_before, identity) in enumerate(people):
            sequence_steps = done + left * (count - at)
            done += left
            between = view.prompt_tokens - prompt_before
            needed_s = _needed_s(replica, left, sequence_steps, between)
            found.append(OracleRequest(left, allowed_s - needed_s, between, identity))
        return found

    def _allowed_s(self, truth: SimulatedEngine, job: ReplicaJob, now_s: float) -> float:
        """When somebody who decodes must have ended."""
        other = truth.jobs[job.identity][1]
        first_s = other.first_s - 0.5 * truth.rtts_s[other.proxy] if other.first_s >= 0.0 else now_s
        return first_s + self.slo.tpot_s * (job.output_tokens - 1)

    def _prospect(self, arrival: Arrival, view: OracleView, now_s: float) -> OraclePrediction:
        truth = self.world.engines[view.engine]
        replica, profile = truth.replica, truth.replica.profile
        own_tokens = arrival.prompt_tokens - replica.cached_tokens(arrival.blocks, arrival.prompt_tokens)
        prompts = view.prompt_tokens + own_tokens
        batch, steps = len(view.lives), max(1, arrival.output_tokens - 1)
        beside_s = profile.base_s + profile.per_sequence_s * batch if batch else 0.0
        wait_s = prompts / profile.prefill_tokens_per_s + -(-prompts // CHUNK_TOKENS) * beside_s
        needed = view.kv_tokens + arrival.prompt_tokens + arrival.output_tokens
        if batch and (batch >= profile.batch_max or 0 < profile.kv_tokens < needed):
            wait_s += min(view.lives) * beside_s  # until the first of them ends
        company = sum([left if left < steps else steps for left in view.lives]) / steps
        tpot_s = (profile.base_s + profile.per_sequence_s * (1.0 + company)) * replica.slowness
        ttft_s = wait_s * replica.slowness + view.boundary.at_s - now_s + truth.rtts_s[arrival.proxy]
        return OraclePrediction(ttft_s + steps * tpot_s, ttft_s, tpot_s, own_tokens, view)

    def _broken_by(self, arrival: Arrival, prospect: OraclePrediction, now_s: float) -> int:
        """How many there, who would keep their TPOT otherwise, would lose it by the newcomer; the first will do."""
        engine, view = prospect.view.engine, prospect.view
        # Whoever was in the way last time mostly still is, and looking at one is ten times faster than at all.
        if self.sheds and self._is_broken(self._tightest_of(view, now_s), arrival, prospect):
            return 1
        broken = 0
        for person in self._people(view, now_s):
            if self._is_broken(person, arrival, prospect):
                self._tightest[engine] = person.identity
                broken += 1
                if self.sheds:
                    break
        return broken

    def _is_broken(self, person: OracleRequest | None, arrival: Arrival, prospect: OraclePrediction) -> bool:
        if person is None or person.spare_s < 0.0:
            return False
        later = person.left - person.between // CHUNK_TOKENS  # its steps from when the newcomer's turn comes
        if later <= 0:
            return False
        replica = self.world.engines[prospect.view.engine].replica
        profile = replica.profile
        sequence_s = profile.per_sequence_s * min(later, arrival.output_tokens)
        cost_s = (prospect.prompt_tokens / profile.prefill_tokens_per_s + sequence_s) * replica.slowness
        return cost_s > person.spare_s - (1.0 - TPOT_SHARE_MAX) * self.slo.tpot_s * person.left

    def _tightest_of(self, view: OracleView, now_s: float) -> OracleRequest | None:
        """The one who was in the way at that engine last time, as of now."""
        truth = self.world.engines[view.engine]
        known = truth.jobs.get(self._tightest.get(view.engine, -1))
        if known is None or known[0].first_step < 0:
            return None
        left = known[0].last_step - view.boundary.steps
        if left <= 0:
            return None
        sequence_steps = sum([left if left < life else life for life in view.lives])
        needed_s = _needed_s(truth.replica, left, sequence_steps, view.prompt_tokens)
        spare_s = self._allowed_s(truth, known[0], now_s) - view.boundary.at_s - needed_s
        return OracleRequest(left, spare_s, view.prompt_tokens, known[0].identity)


def _needed_s(replica: SimulatedReplica, left: int, sequence_steps: int, between: int) -> float:
    """Seconds that so many steps take, with so many sequences in them together and prompt tokens between them."""
    profile = replica.profile
    chunks = -(-between // CHUNK_TOKENS)
    prompts_s = between / profile.prefill_tokens_per_s * (1.0 if left >= chunks else left / chunks)
    return (left * profile.base_s + profile.per_sequence_s * sequence_steps + prompts_s) * replica.slowness


class OracleNoShed(Oracle):
    """The same, but what fits nowhere is sent all the same, to where it breaks least."""

    sheds = False
