"""The seam between requests and connections: a transport sends a request to an Endpoint and reads its response.

A transport is one module `NAME_transport.py` in this folder with `NAME` and `make(network, spawn)`.
"""

from collections.abc import Callable, Coroutine
from typing import Protocol

import msgspec

from fleetgate.core.exchange import AttemptFailed, Failure
from fleetgate.protocols.clients.base import ClientProtocol
from fleetgate.protocols.messages import Operation, Usage
from fleetgate.protocols.resume.splice import StreamSplicer
from fleetgate.protocols.resume.transcript import Transcript
from fleetgate.proxy.transport.connection_pool import ConnectionPool
from fleetgate.proxy.transport.network import Network


class ModelNames:
    """What an engine and its client call the model, as JSON strings; `mark` is how responses usually say the former."""

    __slots__ = ("asked", "mark", "rename")

    def __init__(self, upstream: bytes, asked: bytes) -> None:
        self.asked = asked
        self.rename = None if upstream == asked else (upstream, asked)
        self.mark = b'"model":%b' % (asked if upstream == asked else upstream)


class ResumedStream(msgspec.Struct, frozen=True):
    """The stream that a response continues.

    Units: `event_count` the events that the client has; `inherited` those of them that another engine generated and
    that this engine got as part of its prompt.
    """

    splicer: StreamSplicer
    transcript: Transcript
    event_count: int
    inherited: int


class ExpectedResponse(msgspec.Struct, frozen=True, gc=False):
    """How a response is to be read.

    Shape: `hide_usage`: the usage event was requested by the gateway, so the client does not get it; `wants_whole`: the
    client asked for no stream; `several_choices`: a stream may hold more than one choice, each with its own end; `raw`:
    an HTTP/1.0 client, which gets no chunked framing.
    """

    protocol: ClientProtocol
    operation: Operation
    hide_usage: bool
    names: ModelNames
    wants_whole: bool = False
    several_choices: bool = False
    raw: bool = False
    resumed: ResumedStream | None = None


class UpstreamResponse(Protocol):
    """One response while it is read."""

    transcript: Transcript | None  # of a stream that may be resumed; set by the listener at the first content

    @property
    def status(self) -> int:
        """The HTTP status, 0 before the head."""

    @property
    def stream(self) -> bool:
        """Whether it is an event stream."""

    @property
    def raw(self) -> bool:
        """Whether it is written without chunked framing."""

    @property
    def passed(self) -> bytes:
        """The header lines of the upstream that the client may see."""

    @property
    def held(self) -> list[bytes]:
        """At the first content: the events before it, or the whole body of a response that is not a stream."""

    @property
    def usage(self) -> Usage | None:
        """The usage of the whole response, once the engine has reported it."""

    @property
    def own_usage(self) -> Usage | None:
        """Of a resumed stream: the usage that its own engine reported for its part."""

    @property
    def inherited(self) -> int:
        """Of a resumed stream: the events that another engine generated."""

    @property
    def event_count(self) -> int:
        """The content events read; of a resumed stream also those before it."""

    @property
    def body_bytes(self) -> int:
        """The body bytes read of a response that is not a stream."""

    @property
    def beats(self) -> int:
        """The reads that were not one plain event, such as comments: signs of life."""

    @property
    def finish_seen(self) -> bool:
        """Whether its last content was read: a `finish_reason`, or a whole body that was held."""

    @property
    def is_connected(self) -> bool:
        """Whether the request has a connection now."""

    @property
    def paused(self) -> bool:
        """Whether reading is paused."""

    @property
    def over(self) -> bool:
        """Whether it has ended, failed or was cancelled: nothing is reported of it any more."""

    def cancel(self) -> None:
        """Close the connection at once, which frees the engine's slot. Nothing is reported afterwards."""

    def pause(self) -> None:
        """Stop reading from the connection, or from the one that is being made."""

    def resume(self) -> None:
        """Read from the connection again."""

    def finish(self) -> bool:
        """End a stream of which only usage and `[DONE]` may be missing; False if more is missing."""


class ResponseListener(Protocol):
    """What a transport reports to. It reports nothing before `Transport.send` has returned."""

    def on_first(self, response: UpstreamResponse) -> None:
        """The first content came. Nothing was written before; take `response.held` now."""

    def on_failed(self, response: UpstreamResponse, event: AttemptFailed) -> None:
        """The response failed after the request had a connection."""

    def on_stale(self, response: UpstreamResponse) -> None:
        """The upstream closed a kept connection before any byte of the response: this says nothing about its health."""

    def on_ended(self, response: UpstreamResponse, tail: bytes) -> None:
        """The response ended as it should.

        The listener writes `tail`, after it has released the reservation: a client that sends its next request at once
        must find the slot free.
        """

    def on_dial_slow(self, response: UpstreamResponse) -> None:
        """A new connection takes longer than usual."""

    def on_connected(self, response: UpstreamResponse) -> None:
        """A new connection was made. The request is sent afterwards, unless the listener cancels the response."""

    def on_not_connected(self, response: UpstreamResponse, failure: Failure, reason: str) -> None:
        """No connection could be made; `response.over` tells whether the response was cancelled meanwhile."""

    def on_internal_error(self, error: Exception) -> None:
        """A bug was met while the response was read. It was cancelled, and nothing more is reported of it."""

    def write(self, data: bytes) -> None:
        """Send payload with its framing to the client."""

    def now_s(self) -> float:
        """The event loop's clock."""


class Transport(Protocol):
    """Sends requests to Endpoints."""

    def send(
        self,
        pool: ConnectionPool,
        request: tuple[bytes, ...],
        expected: ExpectedResponse,
        listener: ResponseListener,
        *,
        connect_timeout_s: float,
        fresh: bool = False,
    ) -> UpstreamResponse:
        """Send a request on a kept connection, or on a new one if none is kept or it must be `fresh`."""


Spawn = Callable[[Coroutine[None, None, None]], None]


class TransportModule(Protocol):
    """What a transport's module has."""

    NAME: str

    def make(self, network: Network, spawn: Spawn) -> Transport:
        """A transport that dials through `network` and runs its coroutines with `spawn`."""
