"""What an upstream's error says about it: full, broken, or something of ours."""

import re
from email.utils import parsedate_to_datetime

import msgspec

from fleetgate.core.exchange import Failure


def failure_of(status: int, headers: dict[bytes, bytes]) -> Failure | None:
    """The class of an upstream's error status; None for an answer that is the client's, errors of its own included."""
    if status < 300:
        return None
    if status < 400:
        return Failure.BAD_OUTPUT  # a redirect is never followed: it would send a prompt where nobody registered
    if status in (429, 529):
        return Failure.FULL
    if status == 503:
        # vLLM says 503 when its queue is over the limit it was given: full, not broken. PEERS.md section 2.
        return Failure.FULL if b"retry-after" in headers else Failure.BROKEN
    if status in (401, 403):
        return Failure.CREDENTIAL
    if status in (404, 405, 501):  # llama.cpp without `--embedding` says 501 to who asks for some: it is not broken
        return Failure.MODEL_MISSING
    if status >= 500 or status == 408:
        return Failure.BROKEN
    return None


_SECONDS = re.compile(rb"\d{1,9}(?:\.\d{1,9})?")


def retry_after_s(headers: dict[bytes, bytes], epoch_s: float) -> float:
    """How long an upstream asks to be left alone, 0 where it does not say."""
    value = headers.get(b"retry-after-ms", b"")
    if _SECONDS.fullmatch(value):
        return float(value) / 1000
    value = headers.get(b"retry-after", b"")
    return float(value) if _SECONDS.fullmatch(value) else _until_s(value, headers.get(b"date", b""), epoch_s)


def _until_s(value: bytes, date: bytes, epoch_s: float) -> float:
    """A wait that is given as a date, by the clock of whom it came from where that is told."""
    try:
        until_s = parsedate_to_datetime(value.decode("latin-1")).timestamp()
        now_s = parsedate_to_datetime(date.decode("latin-1")).timestamp() if date else epoch_s
    except (ValueError, OverflowError):
        return 0.0
    return max(0.0, until_s - now_s)


class _Inner(msgspec.Struct):
    code: int | str | None = None
    type: str | None = None


class _Outer(msgspec.Struct):
    error: _Inner | None = None
    response: "_Outer | None" = None


_decode_outer = msgspec.json.Decoder(_Outer).decode
_STATUSES = {"invalid_request_error": 400, "BadRequestError": 400, "rate_limit_error": 429, "rate_limit_exceeded": 429}


def status_of_error(data: bytes) -> int:
    """The status that an error names whose own status was 200; 500 where it names none."""
    try:
        outer = _decode_outer(data)
    except (msgspec.MsgspecError, RecursionError):
        return 500
    error = outer.error or (outer.response and outer.response.error) or _Inner()
    code = error.code
    if isinstance(code, str):
        code = int(code) if code.isdigit() and len(code) == 3 else _STATUSES.get(code)
    code = code or _STATUSES.get(error.type or "", 500)
    return code if 400 <= code < 600 else 500
