"""The class of failure that an upstream's status stands for, and how long the upstream asks the gateway to wait."""

import re
from email.utils import parsedate_to_datetime

from fleetgate.core.exchange import Failure


def failure_of(status: int, headers: dict[bytes, bytes]) -> Failure | None:
    """The class of a status; None for a response that the client gets, the client's own errors included."""
    if status < 300:
        return None
    if status < 400:
        return Failure.BAD_OUTPUT  # redirects are never followed: the target is not a registered Endpoint
    if status in (429, 529):
        return Failure.FULL
    if status == 503:
        # vLLM answers 503 with Retry-After when its queue is over the configured limit: full, not broken.
        return Failure.FULL if b"retry-after" in headers else Failure.BROKEN
    if status in (401, 403):
        return Failure.CREDENTIAL
    if status in (404, 405, 501):  # llama.cpp without `--embedding` answers 501 to embeddings; it is not broken
        return Failure.MODEL_MISSING
    if status >= 500 or status == 408:
        return Failure.BROKEN
    return None


_SECONDS = re.compile(rb"\d{1,9}(?:\.\d{1,9})?")


def retry_after_s(headers: dict[bytes, bytes], epoch_s: float) -> float:
    """The wait that the upstream asks for, 0 if it asks for none."""
    value = headers.get(b"retry-after-ms", b"")
    if _SECONDS.fullmatch(value):
        return float(value) / 1000
    value = headers.get(b"retry-after", b"")
    return float(value) if _SECONDS.fullmatch(value) else _until_s(value, headers.get(b"date", b""), epoch_s)


def _until_s(value: bytes, date: bytes, epoch_s: float) -> float:
    """A wait that is given as a date, relative to the sender's own clock if its Date header is there."""
    try:
        until_s = parsedate_to_datetime(value.decode("latin-1")).timestamp()
        now_s = parsedate_to_datetime(date.decode("latin-1")).timestamp() if date else epoch_s
    except (ValueError, OverflowError):
        return 0.0
    return max(0.0, until_s - now_s)
