"""A proxy's estimate of one Deployment: its Profile, corrected by its streams and refusals.

The caller reports first tokens and ends as they come, and streams and signals once a second. Requests read the
DeploymentView that results.
"""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from fleetgate.core.admission.work_ledger import WorkLedger
from fleetgate.core.capacity.adaptive_limit import AdaptiveLimit, EngineLoad, LimitBounds, LimitChange, ViolationCounts
from fleetgate.core.capacity.deployment_view import Corrections, DeploymentView, EndpointCapacity, current_profile
from fleetgate.core.capacity.latency_model import NOMINAL_SPEED, LatencyPrediction
from fleetgate.core.capacity.speed_learning import SpeedLearner, ThroughputEstimate
from fleetgate.core.capacity.units import batch_within, limit_of, rate_at, step_s, units_of
from fleetgate.core.model import Deployment, Profile, ProfileSource, Slo

# A guess for an engine without a Profile: a mid-size model on one recent GPU. Its streams correct it.
GUESS = Profile(
    name="guess",
    prefill_tokens_per_s=8000.0,
    base_s=0.02,
    per_sequence_s=0.0004,
    batch_max=256,
    source=ProfileSource.GUESS,
)
AHEAD_SHARE_MAX = 0.1
UNOBSERVED_SHARE_MAX = 0.1  # of the time between two ticks
LIMIT_MIN_SHARE, LIMIT_MAX_SHARE = 0.3, 1.5  # of the Profile's limit
UNKNOWN_LIMIT_MAX = 4096  # of one engine without a Profile, in requests
UNKNOWN_BATCH = 32.0  # concurrency at which engines without a Profile are compared until their limits are known


class Observation(NamedTuple):
    """What the caller observes of a Deployment.

    Units: `health` 0 to 1, breaker times slow start; `external_in_flight` are requests from elsewhere.
    Shape: `endpoints` are those that are up; `paused` is set while the engine asks for no requests.
    """

    health: float
    endpoints: tuple[EndpointCapacity, ...]
    external_in_flight: int = 0
    rtt_s: float = 0.0
    paused: bool = False


class DecodeProgress(NamedTuple):
    """The progress of one Endpoint's streams since the last tick. Shape: `steps` is the most tokens of one of them."""

    endpoint: EndpointCapacity
    steps: int


class OnlineEstimate:
    """The estimate of one Deployment in one proxy.

    Latency is predicted only with a Profile. A Deployment without one has a written limit, or a limit learned from
    refusals and from requests that wait in the engine.
    Shape: `slo` is the strictest of the Gateways that list it.
    """

    def __init__(self, deployment: Deployment, slo: Slo) -> None:
        self.deployment = deployment
        self.slo = slo
        self.profile = deployment.profile
        self.speed = SpeedLearner(NOMINAL_SPEED)
        self.engines = max(1, sum(endpoint.engines for endpoint in deployment.endpoints))
        self.throughput = ThroughputEstimate()
        self.slots_guess = UNKNOWN_BATCH  # concurrency of one engine while it has no limit
        self.adaptive_limit = AdaptiveLimit(self._bounds())
        self._prefilled: dict[int, int] = {}
        self._ticked_s = 0.0

    @property
    def current_profile(self) -> Profile:
        """The Profile, or the guess, at the learned speed."""
        profile, factor = self.profile or GUESS, self.speed.factor
        return msgspec.structs.replace(
            profile,
            prefill_tokens_per_s=profile.prefill_tokens_per_s / factor.prefill,
            base_s=profile.base_s * factor.decode,
            per_sequence_s=profile.per_sequence_s * factor.decode,
            units=profile.units / max(factor.prefill, factor.decode),
        )

    @property
    def units(self) -> float:
        """CU of the whole Deployment: as written, or from its Profile; with a Profile, at the learned speed.

        Engines without a Profile are compared by their throughput at their learned limit, whatever their TPOT.
        """
        if self.profile is None and self.deployment.units > 0.0:
            return self.deployment.units
        if self.profile is None:
            slots = self.adaptive_limit.limit or self.slots_guess * self.engines
            measured = self.throughput.units_per_s * slots
            return measured or rate_at(GUESS, slots / self.engines) * self.engines
        at_rest, tpot_s = units_of(self.profile, self.slo.tpot_s), self.slo.tpot_s
        return (self.deployment.units or at_rest * self.engines) * units_of(self.current_profile, tpot_s) / at_rest

    def view(self, observation: Observation) -> DeploymentView:
        """The view that requests read until the next tick."""
        limit = int(self.adaptive_limit.limit)
        profile = None
        if self.profile is not None:
            corrections = Corrections(self.speed.factor, self.adaptive_limit.margin)
            profile = current_profile(self.profile, self.slo, corrections, observation.rtt_s)
        slots = limit or (0 if self.deployment.units > 0.0 else int(self.slots_guess * self.engines))
        return DeploymentView(
            health=observation.health,
            limit=limit,
            external_in_flight=observation.external_in_flight,
            endpoints=observation.endpoints,
            units=self.units,
            current_profile=profile,
            slots=slots,
            paused=observation.paused,
        )

    def record_first_token(self, prediction: LatencyPrediction, observed_s: float) -> None:
        """A first token came. Units: `observed_s` since the request was sent."""
        # Behind other prompts a first token would measure their prefill too.
        if prediction.ahead_s <= AHEAD_SHARE_MAX * prediction.prefill_s:
            self.speed.record_first_token(prediction.ttft_s, observed_s, prediction.prefill_s)

    def record_end(self, units: float, held_s: float) -> None:
        """A response is complete. Units: CU by its real lengths; seconds from sending to its end."""
        self.throughput.record_end(units, held_s)

    def learn_speed(self, work_ledger: WorkLedger, streams: Sequence[DecodeProgress], now_s: float) -> None:
        """Compare the last second with the Profile."""
        passed_s, self._ticked_s = now_s - self._ticked_s, now_s
        if self.profile is not None and 0.0 < passed_s < 10.0:
            self._learn_decode(self.profile, work_ledger, streams, passed_s, now_s)

    def learn_limit(
        self, counts: ViolationCounts, in_flight: int, signals: EngineLoad, now_s: float
    ) -> LimitChange | None:
        """Correct the limit and the margin by recent violations."""
        return self.adaptive_limit.update(counts, in_flight, signals, now_s)

    def _learn_decode(
        self,
        profile: Profile,
        work_ledger: WorkLedger,
        streams: Sequence[DecodeProgress],
        passed_s: float,
        now_s: float,
    ) -> None:
        prompt_token_s = self.speed.factor.prefill / profile.prefill_tokens_per_s
        for endpoint, steps in streams:
            total = work_ledger.prefilled_tokens(endpoint.endpoint_slot)
            tokens = total - self._prefilled.get(endpoint.endpoint_slot, total)
            self._prefilled[endpoint.endpoint_slot] = total
            prompts_s = tokens / endpoint.engines * prompt_token_s
            work = work_ledger.work_at(endpoint.endpoint_slot, prompt_token_s, 1.0, now_s)
            # A pending long prompt took time that no first token accounts for yet.
            if work.pending_tokens / endpoint.engines * prompt_token_s <= UNOBSERVED_SHARE_MAX * passed_s:
                batch = work.sequences / endpoint.engines
                self.speed.record_decode(max(0.0, passed_s - prompts_s), step_s(profile, batch), steps)

    def _bounds(self) -> LimitBounds:
        deployment, tpot_s = self.deployment, self.slo.tpot_s
        if deployment.concurrency_max:
            return LimitBounds(deployment.concurrency_max, 1, deployment.concurrency_max, written=True)
        if deployment.profile is None:
            return LimitBounds(0, self.engines, UNKNOWN_LIMIT_MAX * self.engines)
        start = limit_of(deployment.profile, tpot_s, self.engines)
        most = max(LIMIT_MAX_SHARE * start, batch_within(deployment.profile, tpot_s) * self.engines)
        return LimitBounds(start, max(self.engines, int(LIMIT_MIN_SHARE * start)), int(most))
