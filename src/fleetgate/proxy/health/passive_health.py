"""The health of every Endpoint in one worker, from attempts, probes, latencies and the other workers."""

import random
from collections.abc import Callable, Collection, Iterable
from typing import Protocol

import msgspec

from fleetgate.core.exchange import RETRY_AFTER_MAX_S, Failure
from fleetgate.core.health import outlier_detection
from fleetgate.core.health.circuit_breaker import (
    EJECTED_STATES,
    BreakerState,
    EndpointHealth,
    Signal,
    ejection_end_ms,
    encode_ejection,
)
from fleetgate.ipc.shared_memory import TALLY_CELLS, DeploymentCounter, SharedMemory
from fleetgate.proxy.health import event_messages
from fleetgate.proxy.health.event_messages import DeploymentEvents
from fleetgate.proxy.routing.active_table import ActiveTable
from fleetgate.proxy.routing.deployment_state import DeploymentState
from fleetgate.proxy.routing.endpoint_state import EndpointState
from fleetgate.proxy.routing.model_route import ModelRouteState
from fleetgate.proxy.routing.routing_table import RoutingTable

MODEL_MISSING_S = 30.0  # no request for the model goes to that Deployment for this long
PANIC_EVERY_S = 1.0  # with every Endpoint ejected, each gets one request this often, the least bad first
CREDENTIAL_PROVEN_S = 10.0  # so soon after a good response a 403 may be about the prompt
CREDENTIAL_REFUSALS_MAX = 3  # so many consecutive 403s are about the credential

# The health signal of each failure. Failures without an entry are no signal, or are handled in another way.
SIGNALS = {
    Failure.BROKEN: Signal.BROKE,
    Failure.BAD_OUTPUT: Signal.BROKE,
    Failure.TIMEOUT: Signal.BROKE,
    Failure.UNREACHABLE: Signal.UNREACHABLE,
    Failure.TLS: Signal.UNREACHABLE,
}


class FailedAttempt(msgspec.Struct, frozen=True):
    """An attempt that was lost."""

    endpoint: EndpointState
    failure: Failure
    route: ModelRouteState
    path: bytes


class HealthReactions(Protocol):
    """What requests do after a change of health."""

    def wake_soon(self) -> None:
        """Let waiting requests look for a slot: an Endpoint may take requests again."""

    def move_silent_soon(self, endpoint: EndpointState) -> None:
        """Move requests that wait at an unreachable Endpoint for a first event."""


class PassiveHealthChecker:
    """Sends signals to the circuit breakers of one worker. Shape: `worker` is its column in `shared`."""

    def __init__(
        self,
        active: ActiveTable,
        shared: SharedMemory,
        worker: int,
        events: DeploymentEvents,
        reactions: HealthReactions,
        clock: Callable[[], float],
    ) -> None:
        self._active = active
        self._shared = shared
        self._worker = worker
        self._events = events
        self._reactions = reactions
        self._clock = clock
        self._ejected_s: dict[str, dict[str, float]] = {}  # by region, then Endpoint: when it was last ejected

    # --- results of attempts ---

    def report_failure(self, failed: FailedAttempt) -> tuple[EndpointState, ...]:
        """Record a lost attempt. Returns further Endpoints that would fail this request for the same reason."""
        if failed.failure in SIGNALS:
            self.record_failure(failed.endpoint, failed.failure)
            return ()
        same: tuple[EndpointState, ...] = ()
        for deployment in self._active.current.deployments_at.get(failed.endpoint, ()):
            if failed.failure is Failure.CREDENTIAL:
                same = (*same, *deployment.endpoints)  # all get the same credential
                self._refuse_credential(deployment)
            elif failed.failure is Failure.MODEL_MISSING:
                self._mark_model_missing(failed.route, deployment, failed.path)
        return same

    def record_failure(self, endpoint: EndpointState, failure: Failure) -> None:
        """Record a failure that is a signal of the Endpoint's health."""
        self.record(endpoint, SIGNALS[failure])

    def record(self, endpoint: EndpointState, signal: Signal) -> None:
        """Send one signal to an Endpoint's circuit breaker."""
        before = endpoint.health
        if endpoint.record(signal, self._clock(), random.random()):
            self._on_change(endpoint, before, signal)

    def _on_change(self, endpoint: EndpointState, before: EndpointHealth, signal: Signal) -> None:
        """Publish a changed breaker to the other workers, emit Events, and act on it."""
        health, table, now_s = endpoint.health, self._active.current, self._clock()
        ejection = encode_ejection(health)
        self._shared.ejected_until_ms[endpoint.spec.slot * self._shared.workers + self._worker] = ejection
        endpoint.note_published(ejection)
        if health.breaker in EJECTED_STATES:
            message = event_messages.ejected_message(endpoint.spec, before, health, signal, now_s)
            for deployment in table.deployments_at.get(endpoint, ()):
                deployment.record_ejection(self._shared.in_flight_total(deployment.slot))
                self._events.emit(deployment.spec, str(health.breaker), message)
        table.update_health(endpoint, now_s)
        if health.breaker in (BreakerState.CLOSED, BreakerState.HALF_OPEN):
            self._reactions.wake_soon()
        elif health.breaker in (BreakerState.OPEN, BreakerState.DOWN):
            self._suspect_region(endpoint)
        if health.breaker is BreakerState.DOWN and signal is Signal.PROBE_BROKE:
            self._reactions.move_silent_soon(endpoint)

    def _refuse_credential(self, deployment: DeploymentState) -> None:
        """Eject the Deployment's Endpoints until its credential may have changed. faults.md row 21."""
        if deployment.refuse_credential(self._clock(), CREDENTIAL_PROVEN_S, CREDENTIAL_REFUSALS_MAX):
            for endpoint in deployment.endpoints:
                self.record(endpoint, Signal.DENIED)

    def _mark_model_missing(self, route: ModelRouteState, deployment: DeploymentState, path: bytes) -> None:
        """Exclude a Deployment for a model at a path, although its `models` lists the model. faults.md row 20."""
        route.mark_model_missing(deployment.slot, path, self._clock() + MODEL_MISSING_S)
        message = event_messages.model_missing_message(deployment.spec, route.model, path.decode())
        self._events.emit(deployment.spec, "model_missing", message)

    # --- full engines ---

    def apply_retry_after(self, deployment: DeploymentState, wait_s: float) -> None:
        """Pause a Deployment for the Retry-After of its full engine. faults.md row 16.

        With several Endpoints nothing is paused: the header is about one of them, and the limit protects the others.
        """
        if len(deployment.endpoints) > 1:
            return
        now_s = self._clock()
        deployment.set_retry_after(now_s + min(wait_s, RETRY_AFTER_MAX_S))
        cell = deployment.slot * self._shared.workers + self._worker
        self._shared.retry_after_until_ms[cell] = deployment.retry_after_seen_ms
        deployment.update_pause(now_s)
        self._active.current.on_health_change(deployment)

    # --- regions ---

    def _suspect_region(self, ejected: EndpointState) -> None:
        """Put the rest of a region on trial if much of it was ejected at once and other regions are healthy."""
        now_s, table = self._clock(), self._active.current
        for deployment in table.deployments_at.get(ejected, ()):
            region = deployment.spec.region
            moments_s = self._ejected_s.setdefault(region, {})
            moments_s[f"{deployment.spec.name} at {ejected.spec.origin}"] = now_s
            inside = [other for other in table.deployments.values() if other.spec.region == region]
            members = sum(len(other.endpoints) for other in inside)
            if not outlier_detection.is_region_lost(moments_s, members, now_s) or not _has_other_region(inside):
                continue
            for endpoint in [endpoint for other in inside for endpoint in other.endpoints]:
                if endpoint.health.breaker is BreakerState.CLOSED:
                    endpoint.record(Signal.REGION_LOST, now_s, 0.5)
                    table.update_health(endpoint, now_s)
            message = event_messages.region_lost_message(region, moments_s, now_s)
            self._events.emit(deployment.spec, "region_lost", message)

    # --- ticks ---

    def tick(self, now_s: float, every_second: bool) -> None:
        """Follow the other workers' ejections, every 50 ms; eject outliers of latency, once a second."""
        table = self._active.current
        self._adopt_ejections(table, now_s)
        if any(deployment.health <= 0.0 for deployment in table.deployments.values()):
            for route in table.routes:
                if route.deployments and all(one.health <= 0.0 for one in route.deployments):
                    self._panic(route, now_s)
        if every_second:
            for endpoint in table.endpoints.values():
                if endpoint.is_slow():
                    self._eject_slow(endpoint)
            for deployment in table.deployments.values():
                self._prove_credential(deployment, now_s)

    def _eject_slow(self, endpoint: EndpointState) -> None:
        """Eject an Endpoint with outlying latency if others can take its load.

        If all are slow, eject none: that is load, not a fault.
        """
        deployments = self._active.current.deployments_at.get(endpoint, ())
        routes = [others for deployment in deployments for others in deployment.alternatives]
        if routes and all(any(other.health >= 1.0 for other in others) for others in routes):
            self.record(endpoint, Signal.SLOW)

    def _prove_credential(self, deployment: DeploymentState, now_s: float) -> None:
        at = (deployment.slot * self._shared.workers + self._worker) * TALLY_CELLS
        deployment.prove_credential(self._shared.deployment_counters[at + DeploymentCounter.ENDED], now_s)

    def _adopt_ejections(self, table: RoutingTable, now_s: float) -> None:
        """Eject Endpoints that another worker ejected."""
        for endpoint in table.endpoints.values():
            ejection = self._shared.ejected_until(endpoint.spec.slot)
            is_newer = ejection > endpoint.published and ejection_end_ms(ejection) > now_s * 1000
            if is_newer and endpoint.adopt_ejection(ejection):
                table.update_health(endpoint, now_s)
        for deployment in table.deployments.values():
            deployment.adopt_retry_after(self._shared.retry_after_until(deployment.slot))

    # --- every Endpoint is ejected ---

    def panic_pick(self, route: ModelRouteState, now_s: float, without: Collection[int] = ()) -> bool:
        """Try the least bad ejected Endpoint, each at most once a second. False if none is due. faults.md row 19.

        Shape: `without` excludes the Deployments of these slots.
        """
        deployments = [deployment for deployment in route.deployments if deployment.slot not in without]
        endpoints = (one for deployment in deployments for one in deployment.endpoints)
        endpoint = least_bad(one for one in endpoints if now_s - one.panicked_s >= PANIC_EVERY_S)
        if endpoint is None:
            return False
        endpoint.note_panic(now_s)
        self.record(endpoint, Signal.ALL_EJECTED)
        return True

    def _panic(self, route: ModelRouteState, now_s: float) -> None:
        if self.panic_pick(route, now_s):
            gateway = route.gateway.spec.name
            message = event_messages.panic_message(gateway, route.model)
            self._events.emit(route.deployments[0].spec, f"panic {gateway} {route.model}", message)

    # --- Snapshots ---

    def use(self, before: RoutingTable, table: RoutingTable) -> None:
        """Follow a new Snapshot: forget the Retry-After and refused credential of changed Deployments."""
        for slot, deployment in table.deployments.items():
            known = before.deployments.get(slot)
            if known is None or known.spec != deployment.spec:
                deployment.ignore_retry_after(self._shared.retry_after_until(slot))
            if known is not None and known.spec.credential != deployment.spec.credential:
                for endpoint in deployment.endpoints:
                    self.record(endpoint, Signal.NEW_CREDENTIAL)


def _has_other_region(inside: list[DeploymentState]) -> bool:
    """Whether every route of these Deployments has a healthy Deployment outside their region."""
    slots = {deployment.slot for deployment in inside}
    routes = (others for deployment in inside for others in deployment.alternatives)
    return all(any(other.health > 0.0 for other in others if other.slot not in slots) for others in routes)


def least_bad(endpoints: Iterable[EndpointState]) -> EndpointState | None:
    """The ejected Endpoint to try first: reachable ones before unreachable ones, then the earliest end of ejection."""
    ejected = [one for one in endpoints if one.health.breaker in (BreakerState.OPEN, BreakerState.DOWN)]
    return min(
        ejected, key=lambda one: (one.health.breaker is BreakerState.DOWN, one.health.open_until_s), default=None
    )
