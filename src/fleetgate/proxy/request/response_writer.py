"""The half of a conversation that faces the client: what has been said to it, and what is said on our own account."""

from typing import TYPE_CHECKING

from fleetgate.protocols import http1
from fleetgate.protocols.clients import openai
from fleetgate.proxy.request import response_heads as answers
from fleetgate.proxy.routing.routing_table import DeploymentState

if TYPE_CHECKING:
    from fleetgate.proxy.downstream.client_connection import ClientConnection
    from fleetgate.proxy.downstream.request_authorizer import RequestContext
    from fleetgate.proxy.request.usage import PendingCharge
    from fleetgate.proxy.worker.services import Hub

COMMENT_EVERY_S = 10.0  # FAULTS.md row 6
KEEP_ALIVE = b": keep-alive\n\n"


class ResponseWriter:
    """Writes to one client. Its attributes are a conversation's."""

    # Class attributes are the defaults: most requests never touch most of them, and setting each costs.
    hub: "Hub"
    client: "ClientConnection"
    request: "RequestContext"
    request_id: bytes
    place: DeploymentState | None = None  # where a reservation is held
    first_s = 0.0
    attempts = 0
    owed: "PendingCharge | None" = None  # an attempt that broke off half-way, until it is known who goes on
    status = 0
    written = 0
    tail = b""  # the answer's last bytes, written when its place is free again
    early_attempts = 0  # how many there had been when the head went out before its answer; 0 while it has not
    heard_s = 0.0  # when its client last read something, as far as the looks once a second tell

    def write(self, data: bytes) -> None:
        """Send to the client."""
        if data:
            self.written += len(data)
            self.client.transport.write(data)

    def framed(self, payload: bytes) -> bytes:
        """Part of a body, as this client reads it."""
        return payload if self.request.raw or not payload else http1.chunk(payload)

    def write_event(self, event: bytes) -> None:
        """Send an event or comment of our own."""
        self.write(self.framed(event))

    def say_who_answers(self, place: DeploymentState) -> None:
        """Name the Deployment that answers from here on, where the head named an earlier one."""
        if self.attempts != self.early_attempts:
            self.write_event(answers.place_comment(place, self.attempts))

    def say_as_event(self, body: bytes) -> None:
        """What came is no stream, but its client has been told to read one."""
        self.tail = self.framed(openai.event_of_body(body)) + (b"" if self.request.raw else http1.LAST_CHUNK)

    def keep_alive(self, now_s: float, trying: bool) -> None:
        """A comment, so that nobody between us and the client takes the silence for death; the request may still move.

        While it waits for room nothing is said: a refusal with its status is worth more.
        """
        place = self.place
        if not self.first_s and not self.early_attempts:
            if not trying or place is None or self.client.unread:
                return
            self.early_attempts = self.attempts
            self.status = 200
            if self.request.raw:
                self.client.keep_alive = False
            self.write(answers.early_head(self, place))
        self.heard_s = now_s
        self.write_event(KEEP_ALIVE)
