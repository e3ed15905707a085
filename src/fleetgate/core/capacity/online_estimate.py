"""What a proxy believes of one Deployment: its Profile, corrected by what its streams and refusals show.

A shell tells of first tokens and ends as they come, and of streams and signals once a second; requests read the Outlook
that comes out of it.
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

# A guess for an engine of which nothing is known: a mid-size model on one recent GPU. Its streams correct it.
GUESS = Profile(
    name="guess",
    prefill_tokens_per_s=8000.0,
    base_s=0.02,
    per_sequence_s=0.0004,
    batch_max=256,
    source=ProfileSource.GUESS,
)
AHEAD_SHARE_MAX = 0.1
UNTOLD_SHARE_MAX = 0.1  # of the time between two looks
LIMIT_MIN_SHARE, LIMIT_MAX_SHARE = 0.3, 1.5  # of what the Profile says
UNKNOWN_LIMIT_MAX = 4096  # requests at once in one engine of which nothing is known
UNKNOWN_BATCH = 32.0  # at which unknown engines are compared until their limits are known


class Observation(NamedTuple):
    """What the shell knows of a Deployment besides: fitness 0 to 1, Endpoints that are up, others' requests, RTT."""

    health: float
    endpoints: tuple[EndpointCapacity, ...]
    external_in_flight: int = 0
    rtt_s: float = 0.0
    paused: bool = False


class DecodeProgress(NamedTuple):
    """How far the streams of one Endpoint came since the last tick: the most tokens that one of them got."""

    endpoint: EndpointCapacity
    steps: int


class OnlineEstimate:
    """One Deployment in one proxy.

    Shape: `slo` is the strictest of the Gateways that list it. Only where a Profile is known is room predicted; other
    Deployments have a written limit, or one learned from refusals and from requests that wait in the engine.
    """

    def __init__(self, deployment: Deployment, slo: Slo) -> None:
        self.deployment = deployment
        self.slo = slo
        self.profile = deployment.profile
        self.speed = SpeedLearner(NOMINAL_SPEED)
        self.engines = max(1, sum(endpoint.engines for endpoint in deployment.endpoints))
        self.throughput = ThroughputEstimate()
        self.slots_guess = UNKNOWN_BATCH  # of one engine, while it has no limit
        self.adaptive_limit = AdaptiveLimit(self._bounds())
        self._prefilled: dict[int, int] = {}
        self._ticked_s = 0.0

    @property
    def current_profile(self) -> Profile:
        """The Profile at the pace of now, the guess where there is none."""
        profile, pace = self.profile or GUESS, self.speed.factor
        return msgspec.structs.replace(
            profile,
            prefill_tokens_per_s=profile.prefill_tokens_per_s / pace.prefill,
            base_s=profile.base_s * pace.decode,
            per_sequence_s=profile.per_sequence_s * pace.decode,
            units=profile.units / max(pace.prefill, pace.decode),
        )

    @property
    def units(self) -> float:
        """CU of the whole Deployment: as written, or as its Profile says; with a Profile, at the pace of now.

        Unknown engines are compared by what they get done at their learned limit, whatever the TPOT.
        """
        if self.profile is None and self.deployment.units > 0.0:
            return self.deployment.units
        if self.profile is None:
            places = self.adaptive_limit.limit or self.slots_guess * self.engines
            measured = self.throughput.units_per_s * places
            return measured or rate_at(GUESS, places / self.engines) * self.engines
        at_rest, tpot_s = units_of(self.profile, self.slo.tpot_s), self.slo.tpot_s
        return (self.deployment.units or at_rest * self.engines) * units_of(self.current_profile, tpot_s) / at_rest

    def view(self, sighting: Observation) -> DeploymentView:
        """What requests read until the next tick."""
        limit = int(self.adaptive_limit.limit)
        speed = None
        if self.profile is not None:
            lessons = Corrections(self.speed.factor, self.adaptive_limit.margin)
            speed = current_profile(self.profile, self.slo, lessons, sighting.rtt_s)
        places = limit or (0 if self.deployment.units > 0.0 else int(self.slots_guess * self.engines))
        return DeploymentView(
            health=sighting.health,
            limit=limit,
            external_in_flight=sighting.external_in_flight,
            endpoints=sighting.endpoints,
            units=self.units,
            current_profile=speed,
            slots=places,
            paused=sighting.paused,
        )

    def record_first_token(self, fit: LatencyPrediction, observed_s: float) -> None:
        """A first token came so long after the request was sent."""
        if fit.ahead_s <= AHEAD_SHARE_MAX * fit.prefill_s:  # behind other prompts it would tell of them as well
            self.speed.record_first_token(fit.ttft_s, observed_s, fit.prefill_s)

    def record_end(self, units: float, held_s: float) -> None:
        """An answer ended as it should. Units: CU by its real lengths; seconds from sending to its end."""
        self.throughput.record_end(units, held_s)

    def learn_speed(self, books: WorkLedger, streams: Sequence[DecodeProgress], now_s: float) -> None:
        """Compare the last second with the Profile."""
        passed_s, self._ticked_s = now_s - self._ticked_s, now_s
        if self.profile is not None and 0.0 < passed_s < 10.0:
            self._learn_pace(self.profile, books, streams, passed_s, now_s)

    def learn_limit(
        self, counts: ViolationCounts, in_flight: int, signals: EngineLoad, now_s: float
    ) -> LimitChange | None:
        """Correct limit and margin by what went wrong lately."""
        return self.adaptive_limit.update(counts, in_flight, signals, now_s)

    def _learn_pace(
        self, profile: Profile, books: WorkLedger, streams: Sequence[DecodeProgress], passed_s: float, now_s: float
    ) -> None:
        prompt_token_s = self.speed.factor.prefill / profile.prefill_tokens_per_s
        for seat, steps in streams:
            total = books.prefilled_tokens(seat.endpoint_slot)
            tokens = total - self._prefilled.get(seat.endpoint_slot, total)
            self._prefilled[seat.endpoint_slot] = total
            prompts_s = tokens / seat.engines * prompt_token_s
            work = books.work_at(seat.endpoint_slot, prompt_token_s, 1.0, now_s)
            # A long prompt in hand has taken time that no first token has accounted for yet.
            if work.pending_tokens / seat.engines * prompt_token_s <= UNTOLD_SHARE_MAX * passed_s:
                batch = work.sequences / seat.engines
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
