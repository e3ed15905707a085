"""One request's search for a slot: what it needs, worked out once, and its entry in the queue."""

import msgspec

from fleetgate.core.admission.request_queue import QueueEntry
from fleetgate.core.exchange import NotPicked, QueueFull, QueueTimeout
from fleetgate.proxy.request.placement import PlacedRequest, PlacementQuery, Placer
from fleetgate.proxy.request.registry import RegisteredRequest, RequestRegistry
from fleetgate.proxy.request.request_context import ReceivedRequest
from fleetgate.proxy.request.reservation import PlacementRequest
from fleetgate.proxy.request.resume import Resume
from fleetgate.proxy.routing.endpoint_state import EndpointState
from fleetgate.proxy.routing.model_route import ModelRouteState


class SlotSearch(msgspec.Struct, eq=False):
    """Made when the route's lead cannot take the request. A Struct, so that making one costs no call.

    Shape: `entry` is its place in the queue, None outside it.
    """

    placer: Placer
    registry: RequestRegistry
    id: bytes
    received: ReceivedRequest
    started_s: float
    request: PlacementRequest
    entry: QueueEntry | None = None

    def place(
        self,
        route: ModelRouteState,
        tried: tuple[int, ...],
        failed: tuple[EndpointState, ...],
        resume: Resume | None,
        now_s: float,
    ) -> PlacedRequest | NotPicked:
        """Reserve a slot. Shape: `tried` and `failed` are Deployments (slots) and Endpoints that failed the request."""
        wants_since_s = self.started_s if resume is None else resume.lost_s
        is_queued = self.entry is not None
        query = PlacementQuery(
            self.request, self.id, self.received, route, wants_since_s, is_queued, tried, failed, resume
        )
        return self.placer.place(query, now_s)

    def place_beside(
        self, route: ModelRouteState, tried: tuple[int, ...], now_s: float
    ) -> tuple[PlacedRequest, EndpointState] | None:
        """Reserve a slot elsewhere for a second attempt."""
        query = PlacementQuery(self.request, self.id, self.received, route, self.started_s, tried=tried)
        return self.placer.place_beside(query, now_s)

    def enqueue(
        self, waiter: RegisteredRequest, resume: Resume | None, moved: bool, now_s: float
    ) -> QueueTimeout | QueueFull | None:
        """Wait in the queue; why not, if that would be in vain."""
        wants_since_s = self.started_s if resume is None else resume.lost_s
        query = PlacementQuery(self.request, self.id, self.received, waiter.route, wants_since_s, resume=resume)
        entered = self.placer.enqueue(query, waiter, moved, now_s)
        if not isinstance(entered, QueueEntry):
            return entered
        self.entry = entered
        return None

    def leave_queue(self, waiter: RegisteredRequest, served: bool) -> None:
        """Wait no longer."""
        entry, self.entry = self.entry, None
        if entry is not None:
            self.registry.leave(entry, waiter, served)
