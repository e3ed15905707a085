"""Responses of the gateway itself: errors before routing, the list of models, kept responses."""

from collections.abc import Callable

from fleetgate.protocols import clients, http1
from fleetgate.protocols import error_codes as errors
from fleetgate.protocols.clients.base import ClientProtocol
from fleetgate.proxy.request.response import heads as response_heads
from fleetgate.proxy.request.response.heads import CLOSE, ResponseDefaults
from fleetgate.proxy.telemetry.access_log import AccessLog
from fleetgate.proxy.telemetry.metrics import WorkerMetrics

DEFAULT_PROTOCOL = clients.find("openai")  # of errors before the Gateway is known
INTERNAL_ERROR = errors.INTERNAL_ERROR.message


class RequestRejected(Exception):
    """The request ends with an error of the gateway. Shape: `extra` are header lines."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None, extra: bytes = b"") -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.extra = extra
        self.protocol = DEFAULT_PROTOCOL  # the Gateway's, once it is known

    def spoken_in(self, protocol: ClientProtocol) -> "RequestRejected":
        """The same error in the format of this protocol."""
        self.protocol = protocol
        return self


class LocalResponder:
    """Makes and counts the local responses of one worker."""

    def __init__(
        self,
        defaults: ResponseDefaults,
        next_id: Callable[[], bytes],
        metrics: WorkerMetrics,
        access_log: AccessLog,
    ) -> None:
        self.defaults = defaults
        self.next_id = next_id
        self._metrics = metrics
        self._access_log = access_log
        self._counters: dict[tuple[int, str], int] = {}

    def count(self, status: int, code: str) -> None:
        """Count a request that was not routed. Shape: `code` is of the error table, so labels are bounded."""
        index = self._counters.get((status, code))
        if index is None:
            labels = {"status": str(status), "code": code}
            index = self._counters[status, code] = self._metrics.counter("fleetgate_denied_total", labels)
        self._metrics.cells[index] += 1
        self._access_log.denied(status, code)

    def rejection(self, rejected: RequestRejected, keep_alive: bool, no_body: bool) -> bytes:
        """Count an error and return its bytes."""
        self.count(rejected.status, rejected.code)
        if rejected.status == 204:
            head = http1.status_line(204) + self.defaults.date_line + rejected.extra
            return head + (b"" if keep_alive else CLOSE) + b"\r\n"
        protocol = rejected.protocol
        body = protocol.error_body(rejected.status, rejected.code, rejected.message, rejected.param)
        content_type = b"content-type: %b\r\n" % protocol.ERROR_TYPE
        return self.plain(rejected.status, body, content_type + rejected.extra, keep_alive, no_body)

    def plain(self, status: int, body: bytes, extra: bytes, keep_alive: bool, no_body: bool = False) -> bytes:
        """The bytes of a complete response. Shape: `extra` are header lines, with the content type."""
        if not keep_alive:
            extra += CLOSE
        data = response_heads.plain(status, body, self.defaults.date_line, self.next_id(), extra)
        return data[: -len(body)] if no_body else data

    def internal_error(self, request_id: bytes, protocol: ClientProtocol) -> bytes:
        """Count an internal error and return the bytes of a 500."""
        self.count(500, "internal_error")
        body = protocol.error_body(500, "internal_error", INTERNAL_ERROR)
        extra = b"content-type: %b\r\n" % protocol.ERROR_TYPE + CLOSE
        return response_heads.plain(500, body, self.defaults.date_line, request_id, extra)

    def internal_error_event(self, protocol: ClientProtocol) -> bytes:
        """The same as an event inside a stream, with its framing."""
        self.count(500, "internal_error")
        return http1.chunk(protocol.error_event("internal_error", INTERNAL_ERROR))
