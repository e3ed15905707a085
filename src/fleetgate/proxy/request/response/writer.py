"""Writes the response to one client: the head, relayed bytes, and the gateway's own events."""

import msgspec

from fleetgate.core.exchange import Refuse
from fleetgate.protocols import http1
from fleetgate.protocols.clients.base import ClientProtocol
from fleetgate.protocols.error_codes import MESSAGES
from fleetgate.protocols.http1 import status_line
from fleetgate.proxy.request.request_context import RequestContext
from fleetgate.proxy.request.response import heads as response_heads
from fleetgate.proxy.request.response.client_stream import ClientStream
from fleetgate.proxy.request.response.heads import ResponseDefaults, ResponseMeta
from fleetgate.proxy.routing.deployment_state import DeploymentState
from fleetgate.proxy.transport.interface import UpstreamResponse

KEEP_ALIVE = b": keep-alive\n\n"


class ResponseWriter(msgspec.Struct, eq=False):
    """Writes to one client. A Struct, so that making one costs no call.

    Shape: `tail` has the last bytes of the response, written after its slot is released; `early_attempts` is the
    number of attempts when the head was sent before the upstream's response, 0 if it was not.
    """

    client: ClientStream
    id: bytes
    context: RequestContext
    defaults: ResponseDefaults
    status: int = 0
    written: int = 0
    tail: bytes = b""
    early_attempts: int = 0

    @property
    def protocol(self) -> ClientProtocol:
        """The protocol that the client speaks."""
        return self.context.protocol

    def write(self, data: bytes) -> None:
        """Send to the client. Called for each streamed event; an internal error ends this request alone."""
        try:
            if data:
                self.written += len(data)
                self.client.write(data)
        except Exception as error:
            self.defaults.on_error(error, self.id)
            self.client.fail(self.id)

    def frame(self, payload: bytes) -> bytes:
        """Data with the framing for this client."""
        return payload if self.context.raw or not payload else http1.chunk(payload)

    def write_event(self, event: bytes) -> None:
        """Send an event or comment of the gateway."""
        self.write(self.frame(event))

    def write_error(self, code: str) -> None:
        """Send an error inside the stream."""
        self.write_event(self.context.protocol.error_event(code, MESSAGES[code]))

    def write_relayed_head(self, attempts: int, response: UpstreamResponse, deployment: DeploymentState) -> None:
        """Send the head of a relayed response; a complete one is put into `tail` with its body."""
        self.status = response.status
        whole = response.finish_seen and not response.stream
        if self.early_attempts:
            self.name_deployment(deployment, attempts)
            if whole:  # the client already got the head of a stream
                self.tail = self.frame(self.context.protocol.event_of_body(response.held[0]))
                self.tail += b"" if self.context.raw else http1.LAST_CHUNK
            return
        if self.context.raw and not whole:
            self.client.keep_alive = False  # for an HTTP/1.0 client only the close marks the end
        defaults = self.defaults
        if defaults.draining:
            self.client.keep_alive = False
        closing = b"" if self.client.keep_alive else response_heads.CLOSE
        if whole:
            framing = b"content-length: %d\r\n" % len(response.held[0])
        else:
            framing = b"" if self.context.raw else response_heads.CHUNKED
        head = response_heads.RELAYED_HEAD % (
            response_heads.OK if response.status == 200 else status_line(response.status),
            defaults.date_line,
            response.passed,
            deployment.response_headers,
            self.context.response_headers + closing,
            framing,
            self.id,
            attempts,
        )
        if whole:
            self.tail = head + response.held[0]
        else:
            self.write(head)

    def name_deployment(self, deployment: DeploymentState, attempts: int) -> None:
        """Send a comment with the Deployment's name, if the head named an earlier attempt."""
        if attempts != self.early_attempts:
            self.write_event(response_heads.deployment_comment(deployment, attempts))

    def keep_alive(self, attempts: int, deployment: DeploymentState | None) -> bool:
        """Send a comment, so that no intermediary closes a silent connection; the request may still move.

        Shape: `deployment` of the attempt in hand, None while the request waits: no head is sent then, because a
        refusal with its status is worth more than a comment. False if nothing was sent.
        """
        if not self.written:
            if deployment is None or self.client.is_behind:
                return False
            self.early_attempts = attempts
            self.status = 200
            if self.context.raw:
                self.client.keep_alive = False
            self.write(response_heads.early_head(self._meta(attempts), self.context.raw, deployment))
        self.write_event(KEEP_ALIVE)
        return True

    def append(self, data: bytes) -> None:
        """Hold the last bytes of the response back until its slot is free again."""
        self.tail += data

    def discard(self) -> None:
        """Drop what is held back."""
        self.tail = b""

    def refuse(self, attempts: int, refuse: Refuse) -> bool:
        """Send the gateway's error as the response; False if a head was sent, after which only an event is possible."""
        self.status = refuse.status
        if not self.early_attempts:
            self.write(self._refusal(attempts, refuse))
        return not self.early_attempts

    def hold_refusal(self, attempts: int, refuse: Refuse) -> None:
        """Keep the gateway's error until the slot of the current attempt is released."""
        self.status = refuse.status
        self.tail = self._refusal(attempts, refuse)

    def _refusal(self, attempts: int, refuse: Refuse) -> bytes:
        body = self.context.protocol.error_body(refuse.status, refuse.code, MESSAGES[refuse.code])
        return response_heads.refusal(self._meta(attempts), refuse, self.context.protocol.ERROR_TYPE, body)

    def _meta(self, attempts: int) -> ResponseMeta:
        defaults = self.defaults
        if defaults.draining:
            self.client.keep_alive = False
        closing = b"" if self.client.keep_alive else response_heads.CLOSE
        return ResponseMeta(defaults.date_line, self.id, attempts, self.context.response_headers + closing)
