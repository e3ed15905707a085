"""One request's search for a slot: what it needs, worked out once, and its entry in the queue."""

from fleetgate.core.admission.request_queue import QueueEntry
from fleetgate.core.capacity.token_estimates import TokenEstimates
from fleetgate.core.exchange import NotPicked, QueueFull, QueueTimeout
from fleetgate.proxy.request.placement import PlacedRequest, PlacementQuery, Placer
from fleetgate.proxy.request.registry import RegisteredRequest, RequestRegistry
from fleetgate.proxy.request.request_context import ReceivedRequest
from fleetgate.proxy.request.reservation import PlacementRequest
from fleetgate.proxy.request.resume import Resume
from fleetgate.proxy.routing.endpoint_state import EndpointState
from fleetgate.proxy.routing.model_route import ModelRouteState


class SlotSearch:
    """Made when the route's lead cannot take the request. Shape: `entry` is its place in the queue, None outside it."""

    __slots__ = ("_id", "_placer", "_received", "_registry", "_route", "_started_s", "entry", "request")

    def __init__(
        self,
        placer: Placer,
        registry: RequestRegistry,
        request_id: bytes,
        received: ReceivedRequest,
        estimates: TokenEstimates,
        started_s: float,
    ) -> None:
        self._placer = placer
        self._registry = registry
        self._id = request_id
        self._received = received
        self._route: ModelRouteState = received.route
        self._started_s = started_s
        self.request = PlacementRequest(received, received.route, estimates)
        self.entry: QueueEntry | None = None

    def follow(self, route: ModelRouteState) -> None:
        """A new Snapshot has replaced the route."""
        self._route = route

    def place(
        self, tried: tuple[int, ...], failed: tuple[EndpointState, ...], resume: Resume | None, now_s: float
    ) -> PlacedRequest | NotPicked:
        """Reserve a slot, and leave the queue with it."""
        return self._placer.place(self._query(tried, failed, resume), now_s)

    def place_beside(self, tried: tuple[int, ...], now_s: float) -> tuple[PlacedRequest, EndpointState] | None:
        """Reserve a slot elsewhere for a second attempt."""
        return self._placer.place_beside(self._query(tried, (), None), now_s)

    def enqueue(
        self, waiter: RegisteredRequest, resume: Resume | None, moved: bool, now_s: float
    ) -> QueueTimeout | QueueFull | None:
        """Wait in the queue; why not, if that would be in vain."""
        entered = self._placer.enqueue(self._query((), (), resume), waiter, moved, now_s)
        if not isinstance(entered, QueueEntry):
            return entered
        self.entry = entered
        return None

    def leave_queue(self, waiter: RegisteredRequest, served: bool) -> None:
        """Wait no longer."""
        entry, self.entry = self.entry, None
        if entry is not None:
            self._registry.leave(entry, waiter, served)

    def _query(
        self, tried: tuple[int, ...], failed: tuple[EndpointState, ...], resume: Resume | None
    ) -> PlacementQuery:
        return PlacementQuery(
            request=self.request,
            request_id=self._id,
            received=self._received,
            route=self._route,
            wants_since_s=self._started_s if resume is None else resume.lost_s,
            is_queued=self.entry is not None,
            tried=tried,
            failed=failed,
            resume=resume,
        )
