"""The state of a Deployment in one worker: health, limit, Endpoints, and the fixed parts of heads."""

from collections.abc import Mapping

import msgspec

from fleetgate.core.health.circuit_breaker import BreakerState
from fleetgate.core.health.timeouts import StreamTiming
from fleetgate.core.model import Deployment
from fleetgate.protocols.clients.base import ClientProtocol
from fleetgate.proxy.routing.endpoint_state import EndpointState

IN_FLIGHT_PEAK_MIN = 8  # requests that any engine can serve

# By Endpoint slot, client protocol and path: the part of the head that all requests share.
RequestHeads = Mapping[int, Mapping[ClientProtocol, Mapping[bytes, bytes]]]


class DeploymentState:
    """One Deployment in this worker.

    Shape: `spec` is its Snapshot value; `alternatives` has the other Deployments of each route that lists it.
    """

    def __init__(self, spec: Deployment, endpoints: list[EndpointState], request_heads: RequestHeads) -> None:
        self.spec = spec
        self.slot = spec.slot
        self.endpoints = endpoints
        self.endpoint_by_slot = {endpoint.spec.slot: endpoint for endpoint in endpoints}
        self.health = 1.0  # the mean fitness of its Endpoints; each change of a breaker and each tick updates it
        self.limit = spec.concurrency_max  # the limit in force, 0 for none; updated as it is learned
        self.external_in_flight = 0  # requests at the engine from elsewhere; 0 if that is unknown or stale
        self.request_heads = request_heads
        self.timing = StreamTiming()
        self.paused = False  # no request is sent to it before `retry_after_until_s`
        self.retry_after_until_s = 0.0  # the engine's Retry-After; 0 if it has sent none
        self.retry_after_seen_ms = 0  # the latest of all workers that this worker has read
        self.in_flight_peak = (
            IN_FLIGHT_PEAK_MIN  # when an Endpoint was ejected: the base of the limit while it recovers
        )
        self.credential_refusals = 0  # consecutive
        self.ended_count, self.credential_proven_s = 0, float("-inf")  # responses that ended well; when the last did
        self.alternatives: list[list[DeploymentState]] = []
        self.resumes_prefill = False  # whether its engine can continue another engine's response
        self.token_mark = 0  # identifies the token ids that its engine uses, 0 if unknown
        self.upstream_names = spec.models
        names = (msgspec.json.encode(spec.name), msgspec.json.encode(spec.region))
        self.log_names = b'"deployment":%b,"region":%b' % names
        self.response_headers = b"x-fleetgate-deployment: %b\r\nx-fleetgate-region: %b\r\n" % (
            spec.name.encode(),
            spec.region.encode(),
        )

    def inherit(self, before: "DeploymentState") -> None:
        """Copy the state of the same Deployment in an older routing table."""
        self.timing, self.resumes_prefill, self.token_mark = before.timing, before.resumes_prefill, before.token_mark
        self.paused = before.paused
        self.retry_after_until_s, self.retry_after_seen_ms = before.retry_after_until_s, before.retry_after_seen_ms
        self.in_flight_peak, self.credential_refusals = before.in_flight_peak, before.credential_refusals
        self.ended_count, self.credential_proven_s = before.ended_count, before.credential_proven_s

    def update_health(self, now_s: float) -> None:
        """Compute the mean fitness of its Endpoints, 0 to 1."""
        endpoints = self.endpoints
        self.health = sum(endpoint.fitness(now_s) for endpoint in endpoints) / len(endpoints) if endpoints else 0.0

    def set_retry_after(self, until_s: float) -> None:
        """Record a Retry-After of its engine; an earlier moment than the known one changes nothing."""
        self.retry_after_until_s = max(self.retry_after_until_s, until_s)
        self.retry_after_seen_ms = int(self.retry_after_until_s * 1000)

    def adopt_retry_after(self, until_ms: int) -> None:
        """Follow a Retry-After that another worker received."""
        if until_ms > self.retry_after_seen_ms:
            self.retry_after_seen_ms, self.retry_after_until_s = until_ms, until_ms / 1000

    def ignore_retry_after(self, until_ms: int) -> None:
        """Ignore a Retry-After from before a change of this Deployment."""
        self.retry_after_seen_ms = until_ms

    def update_pause(self, now_s: float) -> None:
        """Pause it until its engine's Retry-After is over."""
        self.paused = now_s < self.retry_after_until_s
        if not self.paused:
            self.retry_after_until_s = 0.0

    def set_external(self, in_flight: int) -> None:
        """Set the number of requests at its engine that come from elsewhere."""
        self.external_in_flight = in_flight

    def set_resume_support(self, prefill: bool, token_mark: int) -> None:
        """Set the results of the resume probe."""
        self.resumes_prefill, self.token_mark = prefill, token_mark

    def record_ejection(self, in_flight: int) -> None:
        """Record that an Endpoint was ejected while so many requests were in flight."""
        self.in_flight_peak = max(self.in_flight_peak, in_flight)

    def refuse_credential(self, now_s: float, proven_s: float, refusals_max: int) -> bool:
        """Count a 401 or 403. False if a response within `proven_s` proved the credential, unless refusals repeat."""
        self.credential_refusals += 1
        return now_s - self.credential_proven_s > proven_s or self.credential_refusals >= refusals_max

    def prove_credential(self, ended_count: int, now_s: float) -> None:
        """Record the credential as proven if a response ended well since the last call."""
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
        """The healthy Endpoint with the fewest requests of this worker, except those in `without`."""
        if len(self.endpoints) == 1 and not without:
            return self.endpoints[0] if self.health > 0.0 else None
        healthy = [endpoint for endpoint in self.endpoints if endpoint not in without and endpoint.fitness(now_s) > 0.0]
        return min(healthy, key=lambda endpoint: endpoint.in_flight) if healthy else None
