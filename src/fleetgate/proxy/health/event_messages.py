"""Events about Deployments and their Endpoints: their sentences, and how often each is emitted."""

from collections.abc import Callable, Mapping

from fleetgate.core.health.circuit_breaker import BreakerState, EndpointHealth, Signal
from fleetgate.core.health.outlier_detection import REGION_S
from fleetgate.core.model import Deployment, Endpoint
from fleetgate.ipc.event_spool import EventRecord, EventSpool

EVENT_EVERY_S = 30.0  # between Events of one kind of one Deployment

_REASONS = {
    Signal.UNREACHABLE: "connections to it fail",
    Signal.PROBE_BROKE: "{probes} consecutive probes got no response",
    Signal.SLOW: "its latency is several times its usual, and other Endpoints can take its load",
}
_FAILED = "{failures} consecutive attempts failed ({broken} of the last {ended} responses)"


class DeploymentEvents:
    """Emits Events about Deployments, each kind of each Deployment at most every 30 s."""

    def __init__(self, spool: EventSpool, clock: Callable[[], float]) -> None:
        self._spool = spool
        self._clock = clock
        self._emitted_s: dict[tuple[int, str], float] = {}

    def emit(self, deployment: Deployment, kind: str, message: str) -> None:
        """Emit an Event. Shape: `kind` separates Events that do not silence each other."""
        now_s, key = self._clock(), (deployment.slot, kind)
        if now_s - self._emitted_s.get(key, float("-inf")) >= EVENT_EVERY_S:
            self._emitted_s[key] = now_s
            self._spool.add(EventRecord("Deployment", deployment.name, message))


def ejected_message(
    endpoint: Endpoint, before: EndpointHealth, health: EndpointHealth, signal: Signal, now_s: float
) -> str:
    """The Event about an ejected Endpoint. Shape: `before` and `health` are its health before and after the signal."""
    for_s = health.open_until_s - now_s
    if health.breaker is BreakerState.DENIED:
        return (
            f"Endpoint {endpoint.origin} ejected for {for_s:.0f} s: it refuses the Deployment's credential; "
            "renew the Secret that `credential` names"
        )
    reason = _REASONS.get(signal, _FAILED).format(
        probes=before.consecutive_probe_failures + 1,
        failures=before.consecutive_failures + 1,
        broken=before.results.broken + 1,
        ended=before.results.ended + 1,
    )
    return f"Endpoint {endpoint.origin} ejected for {for_s:.1f} s: {reason}"


def model_missing_message(deployment: Deployment, model: str, path: str) -> str:
    """The Event about a Deployment that does not serve one of its models at a path."""
    upstream = deployment.models.get(model, model)
    return (
        f"Deployment {deployment.name} answers 404 for model {model} (sent as {upstream}) at {path}: such requests go "
        "to other Deployments; correct the Deployment's `models` unless only the path is missing"
    )


def panic_message(gateway: str, model: str) -> str:
    """The Event about a route without healthy Endpoints."""
    return (
        f"every Deployment for model {model} of Gateway {gateway} is ejected: requests fail at once, except one trial "
        "of each Endpoint per second"
    )


def poison_message(request_id: str, origins: list[str]) -> str:
    """The Event about a poison request."""
    return (
        f"request {request_id} was refused with 502 poison_request: the engines at {' and '.join(origins)} stopped "
        "while they served it"
    )


def region_lost_message(region: str, ejected_s: Mapping[str, float], now_s: float) -> str:
    """The Event about a region with many Endpoints ejected at once."""
    names = sorted(name for name, moment_s in ejected_s.items() if now_s - moment_s <= REGION_S)
    return (
        f"region {region} is treated as lost: {', '.join(names)} ejected within {REGION_S:g} s; "
        "each of its other Endpoints gets one request at a time until one succeeds"
    )
