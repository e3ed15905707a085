"""An error of ours before a request is routed."""

from fleetgate.protocols import clients
from fleetgate.protocols.clients.base import ClientProtocol

DEFAULT_PROTOCOL = clients.find("openai")  # of errors before the Gateway is known


class RequestRejected(Exception):
    """The request ends here with an error of ours. Shape: `extra` are header lines."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None, extra: bytes = b"") -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.extra = extra
        self.protocol = DEFAULT_PROTOCOL  # the Gateway's, once it is known

    def spoken_in(self, protocol: ClientProtocol) -> "RequestRejected":
        """The same, written as this protocol writes errors."""
        self.protocol = protocol
        return self
