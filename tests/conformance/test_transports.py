"""Every transport in the folder, a dropped-in one included, keeps the rules of `proxy/transport/interface.py`.

Each rule is checked on loopback sockets and on the in-memory network.
"""

import asyncio
import inspect
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from fleetgate.core.exchange import Failure
from fleetgate.protocols.http1 import LAST_CHUNK
from fleetgate.proxy import transport
from fleetgate.proxy.transport import asyncio_transport
from fleetgate.proxy.transport.interface import TransportModule
from fleetgate.proxy.transport.response_relay import BODY_KEPT_BYTES_MAX
from tests.conformance.toys import loud_transport
from tests.conformance.transport_rig import (
    BODY,
    DONE,
    EVENTS,
    FINISH,
    ROLE,
    STREAM,
    STREAM_HEAD,
    WHOLE,
    WORLDS,
    MemoryWorld,
    Recorder,
    Rig,
    chunked,
    content,
    dropped_in,
    run,
    streamed,
    whole,
)

TYPED: tuple[TransportModule, ...] = (asyncio_transport, loud_transport)  # mypy compares them with the contract


async def whole_answers_are_byte_exact(rig: Rig) -> None:
    for body in (BODY, BODY.replace(b"hi", "ü".encode() * 3_000)):
        for response in (whole(body), whole(body).partition(b"content-length")[0] + IN_CHUNKS % chunked(body)):
            got = rig.send(WHOLE, fresh=True)
            engine = await rig.engine()
            engine.send(response, len(response) // 2)
            await rig.over(got)
            assert got.reports == ["connected", "first", "ended"]
            assert got.held == body and not got.written and not got.tail
            assert got.response is not None and got.response.usage is not None
            assert got.response.status == 200 and got.response.passed == b"content-type: application/json\r\n"
            assert got.response.event_count == 0


LARGE = whole(b" " * (BODY_KEPT_BYTES_MAX + 2))
IN_CHUNKS = b"transfer-encoding: chunked\r\n\r\n%b0\r\n\r\n"


async def a_stream_is_held_until_its_content_and_then_passed_on(rig: Rig) -> None:
    got = rig.send(STREAM)
    engine = await rig.engine()
    engine.send(STREAM_HEAD + chunked(ROLE))
    await rig.world.turns()
    assert got.reports == ["connected"] and not got.written
    engine.send(chunked(content("a")))
    await rig.until(lambda: got.written)
    assert got.reports == ["connected", "first"] and got.held == ROLE
    engine.send(chunked(content("b")))
    await rig.until(lambda: b'"b"' in got.written)
    assert got.response is not None and got.response.event_count == 2
    engine.send(chunked(FINISH, DONE) + b"0\r\n\r\n")
    await rig.over(got)
    assert got.reports == ["connected", "first", "ended"] and got.tail.endswith(LAST_CHUNK)
    assert got.payload() == ROLE + content("a") + content("b") + FINISH + DONE
    assert got.response.stream and not got.response.body_bytes


async def a_stream_cut_anywhere_is_the_same(rig: Rig) -> None:
    data = streamed(*EVENTS)
    everywhere = isinstance(rig.world, MemoryWorld)
    cuts: list[tuple[int, ...]] = [(at,) for at in range(1, len(data), 1 if everywhere else 97)]
    cuts.append(tuple(range(1, len(data), 1 if everywhere else 53)))
    for number, cut in enumerate(cuts, 1):
        got = rig.send(STREAM)
        engine = await rig.engine(number)
        engine.send(data, *cut)
        await rig.over(got)
        assert got.payload() == b"".join(EVENTS)
        assert got.response is not None and got.response.event_count == 4
        await rig.kept()
    assert rig.pool.connects == 1


async def a_kept_connection_is_used_again(rig: Rig) -> None:
    for number in range(1, 21):
        expected, response = ((STREAM, streamed(*EVENTS)), (WHOLE, whole(BODY)))[number % 2]
        got = rig.send(expected)
        (await rig.engine(number)).send(response)
        await rig.over(got)
        assert got.reports == (["connected"] if number == 1 else []) + ["first", "ended"]
        await rig.kept()
    assert rig.pool.connects == 1 and len(rig.world.connections) == 1


async def a_connection_with_surplus_bytes_is_not_used_again(rig: Rig) -> None:
    got = rig.send(WHOLE)
    engine = await rig.engine()
    engine.send(whole(BODY) + b"HTTP/1.1 200 OK\r\n")
    await rig.over(got)
    await rig.closed(engine)
    assert got.held == BODY and not rig.pool._idle


async def each_failure_is_reported_once(rig: Rig) -> None:
    head = STREAM_HEAD + chunked(ROLE)
    broken = [
        (whole(b"{}", b"503 Service Unavailable"), ""),
        (b"HTTP/1.1 nonsense\r\n\r\n", ""),
        (head, "end"),
        (head, "reset"),
        (head + chunked(content("a")), "end"),
        (head + chunked(content("a")), "reset"),
        (head + b"zz\r\n", ""),
        (STREAM_HEAD + chunked(DONE), ""),
        (b"", "end"),
        (b"", "reset"),
        (b"HTTP/1.1 2", "end"),
    ]
    for data, end in broken:
        got = rig.send(STREAM, fresh=True)
        engine = await rig.engine()
        engine.send(data)
        await rig.world.turns()
        if end:
            getattr(engine, end)()
        await rig.over(got)
        first = ["first"] if b'"a"' in data else []
        assert got.reports == ["connected", *first, "failed"], (data, end)
        await rig.closed(engine)
        await rig.world.turns()
    assert not rig.pool._idle


async def stale_is_only_a_kept_connection_without_bytes(rig: Rig) -> None:
    got = rig.send(WHOLE)
    (await rig.engine()).send(whole(BODY))
    await rig.kept()
    got = rig.send(WHOLE)
    (await rig.engine(2)).end()
    await rig.over(got)
    assert got.reports == ["stale"]
    got = rig.send(WHOLE, fresh=True)
    (await rig.engine()).send(whole(BODY))
    await rig.kept()
    got = rig.send(WHOLE)
    engine = await rig.engine(2)
    engine.send(b"HTTP/1.1 200")
    await rig.world.turns()
    engine.end()
    await rig.over(got)
    assert got.reports == ["failed"] and got.failure is Failure.BROKEN


async def cancel_closes_within_one_turn_and_ends_the_reports(rig: Rig) -> None:
    for data in (b"", b"HTTP/1.1 2", STREAM_HEAD + chunked(ROLE), STREAM_HEAD + chunked(ROLE, content("a"))):
        got = rig.send(STREAM, fresh=True)
        engine = await rig.engine()
        engine.send(data)
        await rig.world.turns()
        reports, written = list(got.reports), got.written
        assert got.response is not None
        got.response.cancel()
        assert got.response.over and not got.response.is_connected
        await asyncio.sleep(0)
        if isinstance(rig.world, MemoryWorld):
            assert engine.is_closed
        await rig.closed(engine)
        got.response.cancel()
        await rig.world.turns()
        assert got.reports == reports and got.written == written
    assert not rig.pool._idle


async def a_body_too_large_to_hold_is_passed_on(rig: Rig) -> None:
    body = b" " * (BODY_KEPT_BYTES_MAX + 2)
    got = rig.send(WHOLE)
    engine = await rig.engine()
    engine.send(whole(body))
    await rig.over(got)
    assert got.reports == ["connected", "first", "ended"] and got.payload() == body
    assert got.response is not None
    assert got.response.event_count == 0 and got.response.body_bytes == len(body)


async def a_listener_may_cancel_at_the_first_content(rig: Rig) -> None:
    for expected, data in ((STREAM, streamed(*EVENTS)), (WHOLE, LARGE)):
        recorder = Recorder()
        recorder.cancelled_at_first = True
        got = rig.send(expected, recorder=recorder)
        engine = await rig.engine()
        engine.send(data)
        await rig.closed(engine)
        await rig.world.turns()
        assert got.reports == ["connected", "first"] and not got.written


async def pause_stops_reading(rig: Rig) -> None:
    got = rig.send(STREAM)
    engine = await rig.engine()
    engine.send(STREAM_HEAD + chunked(ROLE, content("a")))
    await rig.until(lambda: got.written)
    assert got.response is not None
    got.response.pause()
    assert got.response.paused
    before = got.written
    engine.send(chunked(content("b")))
    await rig.world.turns()
    assert got.written == before
    got.response.resume()
    await rig.until(lambda: b'"b"' in got.written)
    got.response.pause()  # the next request on this connection is read all the same
    got.response.resume()
    engine.send(chunked(FINISH, DONE) + b"0\r\n\r\n")
    await rig.over(got)
    got.response.pause()
    assert not got.response.paused


async def pause_holds_for_a_connection_that_is_being_made(rig: Rig) -> None:
    got = rig.send(STREAM)
    assert got.response is not None
    got.response.pause()
    engine = await rig.engine()
    engine.send(STREAM_HEAD + chunked(content("a")))
    await rig.world.turns()
    assert got.reports == ["connected"] and got.response.paused
    got.response.resume()
    await rig.until(lambda: got.written)


async def a_stream_that_lacks_only_its_end_can_be_finished(rig: Rig) -> None:
    got = rig.send(STREAM)
    engine = await rig.engine()
    engine.send(STREAM_HEAD + chunked(ROLE, content("a")))
    await rig.until(lambda: got.written)
    assert got.response is not None and not got.response.finish()
    engine.send(chunked(FINISH))
    await rig.until(lambda: got.response is not None and got.response.finish_seen)
    assert got.response.finish() and got.reports[-1] == "ended"
    assert got.payload() == ROLE + content("a") + FINISH + DONE


async def a_refused_dial_is_reported(rig: Rig) -> None:
    rig.send(WHOLE)
    await rig.engine()
    closed = rig.pool_at(rig.world.closed_port)
    got = rig.send(WHOLE, pool=closed)
    await rig.over(got)
    assert got.reports == ["not connected"] and got.failure is Failure.UNREACHABLE
    assert got.response is not None and got.response.over
    cancelled = rig.send(WHOLE, pool=closed)
    assert cancelled.response is not None
    cancelled.response.cancel()
    await rig.over(cancelled)
    assert cancelled.reports == ["not connected"], "the Endpoint's health must be told of it all the same"


async def a_connection_that_comes_too_late_is_kept(rig: Rig) -> None:
    got = rig.send(WHOLE)
    assert got.response is not None
    got.response.cancel()
    await rig.kept()
    assert not got.reports and not rig.world.connections[0].received
    again = rig.send(WHOLE)
    (await rig.engine()).send(whole(BODY))
    await rig.over(again)
    assert again.reports == ["first", "ended"] and rig.pool.connects == 1


RULES = [
    whole_answers_are_byte_exact,
    a_stream_is_held_until_its_content_and_then_passed_on,
    a_stream_cut_anywhere_is_the_same,
    a_kept_connection_is_used_again,
    a_connection_with_surplus_bytes_is_not_used_again,
    each_failure_is_reported_once,
    stale_is_only_a_kept_connection_without_bytes,
    cancel_closes_within_one_turn_and_ends_the_reports,
    a_body_too_large_to_hold_is_passed_on,
    a_listener_may_cancel_at_the_first_content,
    pause_stops_reading,
    pause_holds_for_a_connection_that_is_being_made,
    a_stream_that_lacks_only_its_end_can_be_finished,
    a_refused_dial_is_reported,
    a_connection_that_comes_too_late_is_kept,
]


def check_shape(module: ModuleType, name: str) -> None:
    """A name and a documented `make`."""
    assert name == module.NAME
    assert inspect.getdoc(module) and inspect.getdoc(module.make)
    assert list(inspect.signature(module.make).parameters) == ["network", "spawn"]


@pytest.mark.parametrize("name", transport.names())
def test_it_has_the_shape(name: str) -> None:
    check_shape(transport.find(name), name)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", transport.names())
def test_it_keeps_the_rule(name: str, world: str, rule) -> None:  # type: ignore[no-untyped-def]
    run(WORLDS[world](), transport.find(name), rule)


def test_a_transport_that_is_dropped_into_the_folder_is_found_and_conforms(tmp_path: Path) -> None:
    shutil.copy(loud_transport.__file__, tmp_path)
    with dropped_in(transport, str(tmp_path)):
        assert transport.names() == ("asyncio", "loud")
        toy = transport.find("loud")
        check_shape(toy, "loud")
        for rule in RULES:
            run(MemoryWorld(), toy, rule)


def test_an_unknown_transport_is_named() -> None:
    with pytest.raises(KeyError, match="no transport 'smoke'; there are: asyncio"):
        transport.find("smoke")


@pytest.mark.parametrize("text", ['NAME = "mute"', "def make(network, spawn): ...", 'NAME = "m"\nmake = print', ""])
def test_a_file_without_name_or_make_is_a_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "mute_transport.py").write_text(text)
    with dropped_in(transport, str(tmp_path)), pytest.raises(TypeError, match="transport mute does not define `NAME ="):
        transport.find("mute")
