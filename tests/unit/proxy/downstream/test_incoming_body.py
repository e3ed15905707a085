"""A request's body that comes in pieces, fast enough or not."""

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetgate.protocols.http1 import ChunkedBody, Malformed, chunk
from fleetgate.proxy.downstream.incoming_body import BODY_BYTES_PER_S_MIN, BODY_GRACE_S, BODY_SLACK_MAX_S, IncomingBody

CONTEXT = cast(Any, None)


@given(st.binary(min_size=1, max_size=200), st.binary(max_size=20), st.integers(1, 50), st.booleans())
def test_any_cut_gives_the_same_body_and_the_same_rest(body: bytes, rest: bytes, step: int, chunked: bool) -> None:
    data = (chunk(body) + b"0\r\n\r\n" if chunked else body) + rest
    incoming = IncomingBody(CONTEXT, 0 if chunked else len(body), ChunkedBody() if chunked else None)
    came, at = 0, 0
    while not incoming.is_whole:
        came += incoming.feed(data[at : at + step])
        at += step
    assert incoming.join() == body and came == incoming.received_bytes == len(body)
    assert incoming.rest + data[at:] == rest and incoming.is_chunked is chunked


def test_wrong_chunks_are_refused() -> None:
    with pytest.raises(Malformed):
        IncomingBody(CONTEXT, 0, ChunkedBody()).feed(b"x\r\n")


def test_a_body_without_bytes_has_its_grace() -> None:
    incoming = IncomingBody(CONTEXT, 1000, None)
    assert incoming.is_fast_enough(BODY_GRACE_S) and not incoming.is_fast_enough(0.1)


def test_a_body_that_was_fast_may_pause_but_not_for_ever() -> None:
    incoming = IncomingBody(CONTEXT, 10**9, None)
    incoming.feed(bytes(100 * BODY_BYTES_PER_S_MIN))
    assert incoming.is_fast_enough(1.0)
    assert incoming.is_fast_enough(BODY_SLACK_MAX_S) and not incoming.is_fast_enough(0.1)


def test_just_fast_enough_lasts() -> None:
    incoming = IncomingBody(CONTEXT, 10**9, None)
    for _ in range(100):
        incoming.feed(bytes(BODY_BYTES_PER_S_MIN))
        assert incoming.is_fast_enough(1.0)
