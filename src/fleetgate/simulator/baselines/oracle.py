"""The reference: a greedy balancer that knows the true state of every engine and the length of every response.

It does not know the future. A request goes to the engine where it ends first, among those at which it meets its own
targets and makes no other request miss its TPOT. If there is none it waits, and is refused once its TTFT target
cannot be met.
"""

from typing import NamedTuple

from fleetgate.core.capacity.latency_model import CHUNK_TOKENS
from fleetgate.core.capacity.units import ttft_target_s
from fleetgate.simulator.baselines.base import BaselineBalancer, BaselineInputs
from fleetgate.simulator.serving.replica import ReplicaJob, SimulatedReplica, StepEnd
from fleetgate.simulator.serving.world import Arrival, SimulatedEngine, World
from fleetgate.simulator.trace_capacity import fastest_idle_s, idle_ttft_s

TPOT_SHARE_MAX = 0.98  # the rest covers the error of counting in whole steps
WAITING_TRIED_MAX = 8  # waiting requests tried when an engine changes, so that a long one does not block the others


class OracleView(NamedTuple):
    """The state of one engine at the end of its current step, with the requests on their way to it.

    Shape: `unstarted` has the uncached prompt tokens and output tokens of prompts that no step has begun;
    `steps_left` has the remaining decode steps of every request there, those on their way included.
    Units: `prompt_tokens` are not computed yet; `kv_tokens` are or will be reserved.
    """

    engine: int
    step_end: StepEnd
    prompt_tokens: int
    kv_tokens: int
    unstarted: list[tuple[int, int]]
    steps_left: list[int]


class OracleRequest(NamedTuple):
    """A request at an engine.

    Units: `slack_s` is the time left after its last step before it would miss its TPOT; `prompt_tokens` are computed
    between its steps. Shape: `request_index` is -1 if it has not begun.
    """

    steps_left: int
    slack_s: float
    prompt_tokens: int
    request_index: int


class OraclePrediction(NamedTuple):
    """How a request would do at one engine if no other request came."""

    end_s: float
    ttft_s: float
    tpot_s: float
    prompt_tokens: int
    view: OracleView


class Oracle(BaselineBalancer):
    """Admits by the true state; unlike the other baselines it has admission."""

    sheds = True

    def __init__(self, world: World, inputs: BaselineInputs) -> None:
        super().__init__(world, inputs)
        self.slo = inputs.fleet.slo
        self._tightest: dict[int, int] = {}  # by engine: the request with the TPOT that was the last obstacle
        self._on_the_way: list[dict[int, Arrival]] = [{} for _ in world.engines]
        self._waiting: dict[int, tuple[Arrival, float, float]] = {}  # with TTFT target and deadline

    def on_arrival(self, arrival: Arrival, now_s: float) -> None:
        """Send the request, let it wait, or refuse it."""
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

    def on_first_token(self, arrival: Arrival, now_s: float) -> None:
        """Try waiting requests: a prompt is computed, so others may fit."""
        self._retry(arrival.replica, now_s)

    def on_finished(self, arrival: Arrival, now_s: float) -> None:
        """Try waiting requests: a slot is free."""
        super().on_finished(arrival, now_s)
        self._on_the_way[arrival.replica].pop(arrival.index, None)
        self._retry(arrival.replica, now_s)

    def on_failed(self, arrival: Arrival, failure: str, now_s: float) -> None:
        """Move the request; it is no longer on its way to that engine."""
        self._on_the_way[arrival.replica].pop(arrival.index, None)
        super().on_failed(arrival, failure, now_s)

    def on_wake(self, now_s: float) -> None:
        """Try requests at their deadline a last time, or refuse them."""
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
        self._on_the_way[engine][arrival.index] = arrival
        self.in_flight[engine] += 1
        self.world.send(arrival, engine, now_s)

    def _retry(self, engine: int, now_s: float) -> None:
        if not self._waiting or not self.world.is_up(engine):
            return
        view = self._view(engine, now_s)
        for arrival, target_s, _ in list(self._waiting.values())[:WAITING_TRIED_MAX]:
            if self._best(arrival, target_s - (now_s - arrival.at_s), now_s, [view]) >= 0:
                del self._waiting[arrival.index]
                self._send(arrival, engine, now_s)
                view = self._view(engine, now_s)

    def _target_s(self, arrival: Arrival) -> float:
        return ttft_target_s(self.slo, arrival.prompt_tokens, fastest_idle_s(self.fleet, arrival.prompt_tokens))

    def _views(self, now_s: float) -> list[OracleView]:
        return [self._view(engine, now_s) for engine in self.up()]

    def _best(self, arrival: Arrival, ttft_left_s: float, now_s: float, views: list[OracleView]) -> int:
        """The engine where it ends first, meets its own targets and makes no other request miss; −1 for none."""
        predictions = [self._predict(arrival, view, now_s) for view in views]
        predictions.sort(key=lambda prediction: (prediction.end_s, prediction.view.engine))
        for prediction in predictions:
            inside = prediction.ttft_s <= ttft_left_s and prediction.tpot_s <= TPOT_SHARE_MAX * self.slo.tpot_s
            if inside and not self._misses_caused(arrival, prediction, now_s):
                return prediction.view.engine
        if self.sheds:
            return -1
        # A request that misses anyway goes where it harms the fewest others; in overload one engine takes them all.
        return min(predictions, key=lambda prediction: self._misses_caused(arrival, prediction, now_s)).view.engine

    def _view(self, engine: int, now_s: float) -> OracleView:
        simulated, on_the_way = self.world.engines[engine], self._on_the_way[engine]
        replica = simulated.replica
        step_end = replica.step_end(now_s)
        steps = step_end.steps
        steps_left = [last - steps for last, _, _ in replica.decoding]
        steps_left += [job.output_tokens - 1 for job in replica.prefilling]
        tokens, kv_tokens = sum([job.prefill_left for job in replica.prefilling]), replica.kv_used
        for index in [index for index in on_the_way if index in simulated.jobs]:
            del on_the_way[index]
        unstarted = []
        requests = [(job.prompt_tokens, job.output_tokens, job.blocks) for job in replica.queue]
        requests += [(other.prompt_tokens, other.output_tokens, other.blocks) for other in on_the_way.values()]
        for prompt_tokens, output_tokens, blocks in requests:
            uncached = prompt_tokens - replica.cached_tokens(blocks, prompt_tokens)
            unstarted.append((uncached, output_tokens))
            tokens += uncached
            kv_tokens += prompt_tokens + output_tokens
            steps_left.append(output_tokens - 1)
        return OracleView(engine, step_end, tokens - step_end.prompt_tokens, kv_tokens, unstarted, steps_left)

    def _requests(self, view: OracleView, now_s: float) -> list[OracleRequest]:
        """Every request at an engine, with its slack once the work already there is done."""
        simulated, tpot_s = self.world.engines[view.engine], self.slo.tpot_s
        replica, step_end = simulated.replica, view.step_end
        # Steps left, seconds allowed for them, prompt tokens computed before them, and index (-1 if not begun).
        rows: list[tuple[int, float, int, int]] = []
        for last, index, job in replica.decoding:
            rows.append((last - step_end.steps, self._allowed_s(simulated, job, now_s) - step_end.at_s, 0, index))
        before = -step_end.prompt_tokens
        prompts = [(job.prefill_left, job.output_tokens) for job in replica.prefilling]
        for uncached, output_tokens in prompts + view.unstarted:
            before += uncached
            rows.append((output_tokens - 1, tpot_s * (output_tokens - 1), before if before > 0 else 0, -1))
        rows.sort()
        found, done, count = [], 0, len(rows)
        for at, (steps_left, allowed_s, prompt_before, index) in enumerate(rows):
            sequence_steps = done + steps_left * (count - at)
            done += steps_left
            prompt_tokens = view.prompt_tokens - prompt_before
            needed_s = _needed_s(replica, steps_left, sequence_steps, prompt_tokens)
            found.append(OracleRequest(steps_left, allowed_s - needed_s, prompt_tokens, index))
        return found

    def _allowed_s(self, simulated: SimulatedEngine, job: ReplicaJob, now_s: float) -> float:
        """The time by which a decoding request must have ended to meet its TPOT."""
        other = simulated.jobs[job.index][1]
        first_s = other.first_s - 0.5 * simulated.rtts_s[other.proxy] if other.first_s >= 0.0 else now_s
        return first_s + self.slo.tpot_s * (job.output_tokens - 1)

    def _predict(self, arrival: Arrival, view: OracleView, now_s: float) -> OraclePrediction:
        simulated = self.world.engines[view.engine]
        replica, profile = simulated.replica, simulated.replica.profile
        own_tokens = arrival.prompt_tokens - replica.cached_tokens(arrival.blocks, arrival.prompt_tokens)
        prompts = view.prompt_tokens + own_tokens
        batch, steps = len(view.steps_left), max(1, arrival.output_tokens - 1)
        decode_s = profile.base_s + profile.per_sequence_s * batch if batch else 0.0
        wait_s = prompts / profile.prefill_tokens_per_s + -(-prompts // CHUNK_TOKENS) * decode_s
        needed = view.kv_tokens + arrival.prompt_tokens + arrival.output_tokens
        if batch and (batch >= profile.batch_max or 0 < profile.kv_tokens < needed):
            wait_s += min(view.steps_left) * decode_s  # until the first of them ends
        others = sum([left if left < steps else steps for left in view.steps_left]) / steps
        tpot_s = (profile.base_s + profile.per_sequence_s * (1.0 + others)) * replica.slowness
        ttft_s = wait_s * replica.slowness + view.step_end.at_s - now_s + simulated.rtts_s[arrival.proxy]
        return OraclePrediction(ttft_s + steps * tpot_s, ttft_s, tpot_s, own_tokens, view)

    def _misses_caused(self, arrival: Arrival, prediction: OraclePrediction, now_s: float) -> int:
        """How many requests at an engine would miss their TPOT because of this one; at most 1 if it sheds."""
        engine, view = prediction.view.engine, prediction.view
        # The last obstacle usually is one still, and checking one request is ten times faster than checking all.
        if self.sheds and self._is_harmed(self._tightest_of(view, now_s), arrival, prediction):
            return 1
        misses = 0
        for request in self._requests(view, now_s):
            if self._is_harmed(request, arrival, prediction):
                self._tightest[engine] = request.request_index
                misses += 1
                if self.sheds:
                    break
        return misses

    def _is_harmed(self, request: OracleRequest | None, arrival: Arrival, prediction: OraclePrediction) -> bool:
        if request is None or request.slack_s < 0.0:
            return False
        shared_steps = request.steps_left - request.prompt_tokens // CHUNK_TOKENS  # after the new prompt's prefill
        if shared_steps <= 0:
            return False
        replica = self.world.engines[prediction.view.engine].replica
        profile = replica.profile
        sequence_s = profile.per_sequence_s * min(shared_steps, arrival.output_tokens)
        cost_s = (prediction.prompt_tokens / profile.prefill_tokens_per_s + sequence_s) * replica.slowness
        return cost_s > request.slack_s - (1.0 - TPOT_SHARE_MAX) * self.slo.tpot_s * request.steps_left

    def _tightest_of(self, view: OracleView, now_s: float) -> OracleRequest | None:
        """The last obstacle at that engine, in its current state."""
        simulated = self.world.engines[view.engine]
        known = simulated.jobs.get(self._tightest.get(view.engine, -1))
        if known is None or known[0].first_step < 0:
            return None
        steps_left = known[0].last_step - view.step_end.steps
        if steps_left <= 0:
            return None
        sequence_steps = sum([steps_left if steps_left < other else other for other in view.steps_left])
        needed_s = _needed_s(simulated.replica, steps_left, sequence_steps, view.prompt_tokens)
        slack_s = self._allowed_s(simulated, known[0], now_s) - view.step_end.at_s - needed_s
        return OracleRequest(steps_left, slack_s, view.prompt_tokens, known[0].index)


def _needed_s(replica: SimulatedReplica, steps: int, sequence_steps: int, prompt_tokens: int) -> float:
    """Seconds for so many steps, with so many sequence steps in total and prompt tokens computed between them."""
    profile = replica.profile
    chunks = -(-prompt_tokens // CHUNK_TOKENS)
    prompts_s = prompt_tokens / profile.prefill_tokens_per_s * (1.0 if steps >= chunks else steps / chunks)
    return (steps * profile.base_s + profile.per_sequence_s * sequence_steps + prompts_s) * replica.slowness


class OracleNoShed(Oracle):
    """The same, but it sends requests that fit nowhere to the engine where they harm the fewest others."""

    sheds = False
