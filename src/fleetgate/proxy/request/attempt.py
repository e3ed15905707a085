"""One attempt at one Endpoint: the slot, the sent request and the response."""

from collections.abc import Callable, Coroutine

import msgspec

from fleetgate.core.admission.ledger import Ledger
from fleetgate.core.health.circuit_breaker import HEALTHY, BreakerState
from fleetgate.proxy.request.registry import RequestRegistry
from fleetgate.proxy.request.request_context import ReceivedRequest
from fleetgate.proxy.request.reservation import Reservation
from fleetgate.proxy.request.resume import Resume
from fleetgate.proxy.request.usage import UsageRecorder
from fleetgate.proxy.routing.active_table import ActiveTable
from fleetgate.proxy.routing.deployment_state import DeploymentState
from fleetgate.proxy.routing.endpoint_state import EndpointState
from fleetgate.proxy.routing.model_route import ModelRouteState
from fleetgate.proxy.transport.interface import (
    ExpectedResponse,
    ModelNames,
    ResponseListener,
    Transport,
    UpstreamResponse,
)

ONE_WRITE_BYTES_MAX = 65536  # up to this size joining head and body costs less than a second write


class AttemptServices(msgspec.Struct, frozen=True):
    """The services that attempts of one worker use."""

    clock: Callable[[], float]
    spawn: Callable[[Coroutine[None, None, None]], None]
    transport: Transport
    active: ActiveTable
    ledger: Ledger
    registry: RequestRegistry


class CarriedRequest(msgspec.Struct):
    """What an attempt sends. Shape: `resume` is set if another Deployment began the response."""

    id: bytes
    number: int
    received: ReceivedRequest
    resume: Resume | None
    listener: ResponseListener


class Attempt(msgspec.Struct, eq=False):
    """One attempt at one Endpoint, from its reservation to its settlement. A Struct, so that making one costs no call.

    Shape: `reservation` is None where the route's lead took the request; `id` is its id in the usage journal, empty
    before it is sent and after it was accounted for; `on_trial` marks an attempt that shows whether an ejected Endpoint
    is healthy again.
    """

    services: AttemptServices
    route: ModelRouteState
    deployment: DeploymentState
    reservation: Reservation | None
    endpoint: EndpointState | None = None
    response: UpstreamResponse | None = None
    id: bytes = b""
    on_trial: bool = False
    sent_s: float = 0.0
    settled: bool = False

    def choose_endpoint(self, now_s: float, failed: tuple[EndpointState, ...]) -> EndpointState | None:
        """The Endpoint that the scheduler chose, or, if it has just become unhealthy, another of the Deployment."""
        deployment, reservation = self.deployment, self.reservation
        if reservation is None:
            return deployment.choose_endpoint(now_s, failed)
        endpoint = deployment.endpoint_by_slot.get(reservation.endpoint_slot)
        if endpoint is None or endpoint in failed or endpoint.fitness(now_s) <= 0.0:
            endpoint = deployment.choose_endpoint(now_s, failed)
            if endpoint is not None:
                reservation.move(endpoint.spec.slot)
        return endpoint

    def send(self, endpoint: EndpointState, usage: UsageRecorder, carried: CarriedRequest, now_s: float) -> None:
        """Occupy the Endpoint and send the request there, for the first time. `carried.number` counts attempts."""
        self.endpoint = endpoint
        self.sent_s = now_s
        endpoint.in_flight += 1
        if endpoint.health is not HEALTHY and endpoint.health.breaker is not BreakerState.CLOSED:
            self.on_trial = self.services.active.current.begin_trial(endpoint, now_s)
        self.id = b"%b-%d" % (carried.id, carried.number)
        usage.begin(self.deployment, self.id)
        self.transmit(carried)

    def transmit(self, carried: CarriedRequest, fresh: bool = False) -> None:
        """Write the request on a kept connection, or on a new one if none is kept or it must be `fresh`."""
        endpoint, deployment, route, received = self.endpoint, self.deployment, self.route, carried.received
        assert endpoint is not None
        expected = expected_response(received, route, deployment, carried.resume)
        request = request_bytes(carried, deployment, endpoint, expected.hide_usage)
        timeout_s = route.gateway.spec.resilience.connect_timeout_s
        self.response = self.services.transport.send(
            endpoint.pool, request, expected, carried.listener, connect_timeout_s=timeout_s, fresh=fresh
        )

    def send_again(self, usage: UsageRecorder, carried: CarriedRequest) -> None:
        """Send it once more, on a new connection, as a new row of the journal."""
        self.id = usage.begin_again(self.deployment, self.id)
        self.transmit(carried, fresh=True)

    def account(self, usage: UsageRecorder, how: bytes, was_read: bool) -> None:
        """Close its row of the journal, once: `how` it ended, and whether the client read any of it."""
        attempt_id, self.id = self.id, b""
        if attempt_id:
            usage.lost(attempt_id, self.response, how, was_read)

    def show_content(self, now_s: float) -> None:
        """Note the first content: it ends a trial, which must not last as long as the response."""
        if self.on_trial and self.endpoint is not None:
            self.on_trial = False
            self.services.active.current.end_trial(self.endpoint, now_s, True)

    def cancel(self) -> None:
        """Close its connection: the response is no longer needed."""
        if self.response is not None:
            self.response.cancel()

    def settle(self, now_s: float) -> None:
        """Release its slot; later calls do nothing."""
        if self.settled:
            return
        self.settled = True
        services, endpoint = self.services, self.endpoint
        if endpoint is not None:
            endpoint.in_flight -= 1
            if self.on_trial:
                self.on_trial = False
                services.active.current.end_trial(endpoint, now_s, False)
        self.route.drain_rate.record_end(now_s)
        if self.reservation is None:
            services.ledger.settle(self.deployment.slot)
        else:
            self.reservation.settle()
        services.registry.slot_freed()


def expected_response(
    received: ReceivedRequest, route: ModelRouteState, deployment: DeploymentState, resume: Resume | None
) -> ExpectedResponse:
    """How the response to this attempt is to be read."""
    info, operation, protocol = received.info, received.operation, received.context.protocol
    upstream_name, engine = deployment.upstream_names[info.model], deployment.spec.engine
    hide_usage = info.stream and not info.wants_usage and operation.usage_option and engine in protocol.USAGE_ENGINES
    names = route.same_name
    if upstream_name != info.model:
        names = ModelNames(msgspec.json.encode(upstream_name), names.asked)
    return ExpectedResponse(
        protocol=protocol,
        operation=operation,
        hide_usage=hide_usage,
        names=names,
        wants_whole=not info.stream,
        several_choices=resume is None and info.several and info.stream,
        raw=received.context.raw,
        resumed=None if resume is None else resume.answer(operation),
    )


def request_bytes(
    carried: CarriedRequest, deployment: DeploymentState, endpoint: EndpointState, add_usage: bool
) -> tuple[bytes, ...]:
    """The body for this Endpoint, with its name for the model; for a resumed response also with the text so far."""
    received, resume = carried.received, carried.resume
    info, body, context = received.info, received.body, received.context
    path = context.path
    if resume is not None:
        path = resume.path(path)
        body = resume.body(body, deployment.spec.engine)
    upstream_name = deployment.upstream_names[info.model]
    if add_usage or upstream_name != info.model:
        body = context.protocol.rewrite(body, info, upstream_name, add_usage)
    head = b"%b%bx-request-id: %b\r\ncontent-length: %d\r\n\r\n" % (
        deployment.request_heads[endpoint.spec.slot][context.protocol][path],
        context.forwarded_headers,
        carried.id,
        len(body),
    )
    return (head + body,) if len(body) < ONE_WRITE_BYTES_MAX else (head, body)
