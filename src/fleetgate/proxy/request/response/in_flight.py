"""A request, as the connection of its client uses it. The worker hands the connection a factory."""

from collections.abc import Callable
from typing import Protocol

from fleetgate.core.exchange import Refuse
from fleetgate.proxy.request.request_context import ReceivedRequest
from fleetgate.proxy.request.response.client_stream import ClientStream
from fleetgate.proxy.request.response.writer import ResponseWriter


class InFlightRequest(Protocol):
    """A request in flight."""

    id: bytes
    writer: ResponseWriter

    @property
    def is_streaming(self) -> bool:
        """Whether an SSE comment may be sent to the client now."""

    def start(self) -> None:
        """Begin. Called once, after the connection has stored it."""

    def client_gone(self) -> None:
        """Cancel it: the client left."""

    def terminate(self, why: Refuse) -> None:
        """End it with an error while its client is connected."""

    def pause(self) -> None:
        """Pause it: the client reads slower than the upstream writes."""

    def resume(self) -> None:
        """Resume it: the client caught up."""

    def fail(self) -> bool:
        """End it after an internal error, silently; True if an SSE error event may still be written."""


RequestFactory = Callable[[ClientStream, ReceivedRequest], InFlightRequest]
