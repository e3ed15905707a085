"""Splitting streams into events."""

import pytest

from fleetgate.protocols.sse import EVENT_BYTES_MAX, Events, EventTooLong, data_of


def test_events_keep_their_ends() -> None:
    events = Events()
    assert events.feed(b"data: 1\n\nda") == [b"data: 1\n\n"]
    assert events.partial == b"da"
    assert events.feed(b"ta: 2\r\n\r\n: c\n\n") == [b"data: 2\r\n\r\n", b": c\n\n"]
    assert events.partial == b""
    assert events.feed(b"data: 3\r\rdata: 4\r\r") == [b"data: 3\r\r", b"data: 4\r\r"]


@pytest.mark.parametrize("ends", [b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n", b"\r\n\n"])
def test_any_mix_of_line_ends_ends_an_event_at_once(ends: bytes) -> None:
    events = Events()
    assert events.feed(b"data: 1" + ends) == [b"data: 1" + ends]
    assert events.partial == b""
    assert events.feed(b"data: 2" + ends + b"da") == [b"data: 2" + ends]


def test_a_cr_lf_that_is_cut_in_two_is_one_line_end() -> None:
    events = Events()
    assert events.feed(b"data: 1\r") == [] and events.feed(b"\ndata: 2\r") == []
    assert events.feed(b"\n\r") == [] and events.feed(b"\n") == [b"data: 1\r\ndata: 2\r\n\r\n"]


def test_an_event_may_be_as_long_as_the_limit_and_no_longer() -> None:
    exact = b"x" * EVENT_BYTES_MAX
    events = Events()
    assert events.feed(exact) == []
    assert events.feed(b"\n\n") == [exact + b"\n\n"]
    with pytest.raises(EventTooLong):
        Events().feed(exact + b"x")
    with pytest.raises(EventTooLong):
        Events().feed(exact + b"three\n\n")


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: {}\n\n", b"{}"),
        (b"data:{}\n\n", b"{}"),
        (b"data:  {}\n\n", b" {}"),
        (b"data: {}\r\n\r\n", b"{}"),
        (b"event: x\ndata: {}\nid: 1\n\n", b"{}"),
        (b"data: a\ndata: b\n\n", b"a\nb"),
        (b"data\n\n", b""),
        (b": comment\n\n", None),
        (b"event: ping\n\n", None),
        (b"\n\n", None),
        (b"xdata: 1\n\n", None),
        (b"data:\n\n", b""),
    ],
)
def test_the_data_of_an_event(event: bytes, data: bytes | None) -> None:
    assert data_of(event) == data
