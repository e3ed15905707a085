"""An error of ours before a request is routed."""


class RequestRejected(Exception):
    """The request ends here with an error of ours. Shape: `extra` are header lines."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None, extra: bytes = b"") -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.extra = extra
