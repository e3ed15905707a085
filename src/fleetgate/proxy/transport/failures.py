"""What an upstream's error says about it: full, broken, or something of ours."""

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
    if status == 404:
        return Failure.MODEL_MISSING
    if status >= 500 or status == 408:
        return Failure.BROKEN
    return None


def retry_after_s(headers: dict[bytes, bytes]) -> float:
    """How long an upstream asks to be left alone, 0 where it does not say."""
    value = headers.get(b"retry-after-ms", b"")
    if value.isdigit():
        return int(value) / 1000
    value = headers.get(b"retry-after", b"")
    return float(value) if value.isdigit() and len(value) < 6 else 0.0


def failure_of_event(event: bytes) -> Failure:
    """An error as the first event counts as the status it names. FAULTS.md row 24."""
    for text, failure in ((b"429", Failure.FULL), (b"529", Failure.FULL), (b"401", Failure.CREDENTIAL)):
        if b'"code":' + text in event or b'"code": ' + text in event:
            return failure
    return Failure.BROKEN
