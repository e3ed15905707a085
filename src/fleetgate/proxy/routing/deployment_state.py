"""A Deployment as requests use it: its Endpoints, its names of models, and the fixed headers of its answers."""

from collections.abc import Mapping

import msgspec

from fleetgate.core.health.circuit_breaker import BreakerState
from fleetgate.core.health.timeouts import StreamTiming
from fleetgate.core.model import Deployment
from fleetgate.protocols.clients.base import ClientProtocol
from fleetgate.proxy.routing.endpoint_state import EndpointState

IN_FLIGHT_PEAK_MIN = 8  # requests that an engine of unknown capacity can certainly take

# By Endpoint slot, client protocol and path: the head up to what differs between requests.
RequestHeads = Mapping[int, Mapping[ClientProtocol, Mapping[bytes, bytes]]]


class DeploymentState:
    """One Deployment in this worker.

    Shape: `spec` is its Snapshot value; `alternatives` are, for each route that lists it, the other Deployments there.
    """

    def __init__(self, spec: Deployment, endpoints: list[EndpointState], request_heads: RequestHeads) -> None:
        self.spec = spec
        self.slot = spec.slot
        self.endpoints = endpoints
        self.endpoint_by_slot = {endpoint.spec.slot: endpoint for endpoint in endpoints}
        self.health = 1.0  # the mean fitness of its Endpoints; each change of a breaker and each tick updates it
        self.limit = spec.concurrency_max  # the limit in force, 0 for none; updated with what is learned
        self.external_in_flight = 0  # requests at the engine from elsewhere; 0 if that is unknown or stale
        self.request_heads = request_heads
        self.timing = StreamTiming()
        self.paused = False  # no request is sent to it before `retry_after_until_s`
        self.retry_after_until_s = 0.0  # until when its engine asks to be left alone
        self.retry_after_told_ms = 0  # the last such moment that this worker knows of, from itself or another worker
        self.in_flight_peak = IN_FLIGHT_PEAK_MIN  # in flight when an Endpoint was ejected: a limit for its recovery
        self.credential_refusals = 0  # consecutive
        self.ended_count, self.credential_proven_s = 0, float("-inf")  # answers that ended well, and when the last did
        self.alternatives: list[list[DeploymentState]] = []
        self.resumes_prefill = False  # whether its engine was seen to continue an answer that another had begun
        self.token_mark = 0  # the mark of the token ids that its engine gives and takes, 0 if unknown
        self.upstream_names = spec.models
        names = (msgspec.json.encode(spec.name), msgspec.json.encode(spec.region))
        self.log_names = b'"deployment":%b,"region":%b' % names
        self.response_headers = b"x-fleetgate-deployment: %b\r\nx-fleetgate-region: %b\r\n" % (
            spec.name.encode(),
            spec.region.encode(),
        )

    def inherit(self, before: "DeploymentState") -> None:
        """Take over what is known of the same Deployment of an older Snapshot."""
        self.timing, self.resumes_prefill, self.token_mark = before.timing, before.resumes_prefill, before.token_mark
        self.paused = before.paused
        self.retry_after_until_s, self.retry_after_told_ms = before.retry_after_until_s, before.retry_after_told_ms
        self.in_flight_peak, self.credential_refusals = before.in_flight_peak, before.credential_refusals
        self.ended_count, self.credential_proven_s = before.ended_count, before.credential_proven_s

    def update_health(self, now_s: float) -> None:
        """Work out the mean fitness of its Endpoints, 0 to 1."""
        endpoints = self.endpoints
        self.health = sum(one.fitness(now_s) for one in endpoints) / len(endpoints) if endpoints else 0.0

    def set_retry_after(self, until_s: float) -> None:
        """Its engine asks to be left alone until then; a shorter time than is known changes nothing."""
        self.retry_after_until_s = max(self.retry_after_until_s, until_s)
        self.retry_after_told_ms = int(self.retry_after_until_s * 1000)

    def adopt_retry_after(self, until_ms: int) -> None:
        """Another worker was asked to leave it alone until then."""
        if until_ms > self.retry_after_told_ms:
            self.retry_after_told_ms, self.retry_after_until_s = until_ms, until_ms / 1000

    def ignore_retry_after(self, until_ms: int) -> None:
        """What workers were told before a change of this Deployment says nothing about it now."""
        self.retry_after_told_ms = until_ms

    def update_pause(self, now_s: float) -> None:
        """Pause it while its engine asks for that."""
        self.paused = now_s < self.retry_after_until_s
        if not self.paused:
            self.retry_after_until_s = 0.0

    def set_external(self, in_flight: int) -> None:
        """So many requests from elsewhere are at its engine."""
        self.external_in_flight = in_flight

    def set_resume_support(self, prefill: bool, token_mark: int) -> None:
        """What the resume probe has found of its engines."""
        self.resumes_prefill, self.token_mark = prefill, token_mark

    def record_ejection(self, in_flight: int) -> None:
        """An Endpoint was ejected while so many requests were in flight."""
        self.in_flight_peak = max(self.in_flight_peak, in_flight)

    def refuse_credential(self, now_s: float, proven_s: float, refusals_max: int) -> bool:
        """A 401 or 403 came; False if an answer within `proven_s` proves the credential, unless it is repeated."""
        self.credential_refusals += 1
        return now_s - self.credential_proven_s > proven_s or self.credential_refusals >= refusals_max

    def prove_credential(self, ended_count: int, now_s: float) -> None:
        """An answer that ended well since the last call proves the credential."""
        if ended_count != self.ended_count:
            self.ended_count, self.credential_proven_s, self.credential_refusals = ended_count, now_s, 0

    @property
    def is_denied(self) -> bool:
        """Whether its engine refuses the Deployment's credential."""
        return all(endpoint.health.breaker is BreakerState.DENIED for endpoint in self.endpoints)

    def limit_share(self, now_s: float) -> float:
        """The share of its limit in force: less than 1 while it recovers, if its alternatives can take the rest."""
        if self.health >= 1.0 or not self.alternatives:
            return 1.0
        if not all(any(other.health >= 1.0 for other in others) for others in self.alternatives):
            return 1.0
        fitness = [share for endpoint in self.endpoints if (share := endpoint.fitness(now_s)) > 0.0]
        return sum(fitness) / len(fitness) if fitness else 1.0

    def healthy_endpoints(self, now_s: float) -> list[EndpointState]:
        """Its Endpoints that may be tried now."""
        return [endpoint for endpoint in self.endpoints if endpoint.fitness(now_s) > 0.0]

    def choose_endpoint(self, now_s: float, without: tuple[EndpointState, ...] = ()) -> EndpointState | None:
        """The healthy Endpoint with the fewest requests of this worker, leaving some out."""
        if len(self.endpoints) == 1 and not without:
            return self.endpoints[0] if self.health > 0.0 else None
        healthy = [one for one in self.endpoints if one not in without and one.fitness(now_s) > 0.0]
        return min(healthy, key=lambda endpoint: endpoint.in_flight) if healthy else None
