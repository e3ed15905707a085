"""The in-memory network behaves as sockets do, and counts what a program does with its bytes."""

import asyncio
import operator
import socket
from collections.abc import Iterator
from contextlib import closing
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetgate.proxy.transport.memory_network import (
    READ_BYTES_MAX,
    CountedBytes,
    MemoryNetwork,
    MemoryTransport,
    RemoteEnd,
    SimulatedLoop,
    Work,
)


class Program(asyncio.Protocol):
    """A program's end that writes down what it is told."""

    def __init__(self) -> None:
        self.reads: list[bytes] = []
        self.calls: list[str] = []
        self.half_close = False
        self.lost: Exception | str | None = "not lost"
        self.transport: asyncio.Transport

    def itself(self) -> "Program":
        return self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        assert self.lost == "not lost"
        self.reads.append(data)

    def eof_received(self) -> bool:
        self.calls.append("eof")
        return self.half_close

    def pause_writing(self) -> None:
        self.calls.append("pause")

    def resume_writing(self) -> None:
        self.calls.append("resume")

    def connection_lost(self, error: Exception | None) -> None:
        assert self.lost == "not lost", "lost twice"
        self.lost = error


@pytest.fixture
def loop() -> Iterator[SimulatedLoop]:
    with closing(SimulatedLoop()) as made:
        yield made


@pytest.fixture
def network(loop: SimulatedLoop) -> MemoryNetwork:
    return MemoryNetwork(loop)


@pytest.fixture
def program() -> Program:
    return Program()


@pytest.fixture
def remote(network: MemoryNetwork, program: Program) -> RemoteEnd:
    return network.client(lambda: program)


class TestClock:
    """The loop waits for nothing."""

    def test_a_timer_runs_at_its_own_time(self, loop: SimulatedLoop) -> None:
        ran: list[float] = []
        begin_s = loop.time()
        for delay_s in (3.0, 1.0, 2.0):
            loop.call_later(delay_s, lambda: ran.append(loop.time() - begin_s))
        loop.call_later(1.5, ran.clear).cancel()
        loop.run_ready()
        assert not ran and loop.time() == begin_s
        loop.advance(2.5)
        assert ran == [1.0, 2.0] and loop.time() == begin_s + 2.5
        loop.advance(1.0)
        assert ran == [1.0, 2.0, 3.0]

    def test_a_timeout_of_hours_costs_no_time(self, loop: SimulatedLoop) -> None:
        async def scene() -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(7200):
                    await asyncio.sleep(9000)

        begin_s = loop.time()
        loop.run_until_complete(scene())
        assert loop.time() == pytest.approx(begin_s + 7200)

    def test_waiting_for_what_cannot_come_is_an_error(self, loop: SimulatedLoop) -> None:
        task = loop.create_task(asyncio.sleep(0))
        with pytest.raises(RuntimeError, match="no callback and no timer is left"):
            loop.run_until_complete(loop.create_future())
        assert task.done()

    def test_callbacks_without_end_are_an_error(self, loop: SimulatedLoop, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fleetgate.proxy.transport.memory_network.CALLBACKS_MAX", 100)

        def again() -> None:
            loop.call_soon(again)

        loop.call_soon(again)
        with pytest.raises(AssertionError, match="no end"):
            loop.run_ready()

    def test_names_are_the_tests_own(self, loop: SimulatedLoop) -> None:
        async def addresses(host: str) -> list[str]:
            return [info[4][0] for info in await loop.getaddrinfo(host, 80)]

        loop.names["engine.test"] = ["10.0.0.1", "10.0.0.2"]
        assert loop.run_until_complete(addresses("engine.test")) == ["10.0.0.1", "10.0.0.2"]
        assert loop.run_until_complete(addresses("::1")) == ["::1"]
        with pytest.raises(socket.gaierror, match="is not in SimulatedLoop"):
            loop.run_until_complete(addresses("other.test"))


class TestDialling:
    """What a dial can meet."""

    def dial(self, loop: SimulatedLoop, network: MemoryNetwork, port: int, timeout_s: float = 5.0) -> Program:
        async def scene() -> Program:
            async with asyncio.timeout(timeout_s):
                return await network.connect("127.0.0.1", port, Program, None)

        return loop.run_until_complete(scene())

    def test_a_listener_accepts(self, loop: SimulatedLoop, network: MemoryNetwork) -> None:
        listener = network.listen(80)
        met: list[RemoteEnd] = []
        listener.on_connect = met.append
        program = self.dial(loop, network, 80)
        assert met == listener.connections and listener.dials == 1
        assert program.transport.get_extra_info("peername") == ("127.0.0.1", 80)
        assert program.transport.get_extra_info("socket") is None

    def test_an_address_without_a_listener_refuses(self, loop: SimulatedLoop, network: MemoryNetwork) -> None:
        with pytest.raises(ConnectionRefusedError, match=r"127\.0\.0\.1:81"):
            self.dial(loop, network, 81)

    def test_a_blackhole_answers_never(self, loop: SimulatedLoop, network: MemoryNetwork) -> None:
        network.listen(80).is_blackhole = True
        begin_s = loop.time()
        with pytest.raises(TimeoutError):
            self.dial(loop, network, 80, 3.0)
        assert loop.time() == pytest.approx(begin_s + 3.0) and not network.listen(80).connections

    def test_a_dial_takes_its_time_or_fails(self, loop: SimulatedLoop, network: MemoryNetwork) -> None:
        listener = network.listen(80)
        listener.dial_s = 0.7
        begin_s = loop.time()
        self.dial(loop, network, 80)
        assert loop.time() == pytest.approx(begin_s + 0.7)
        listener.error = OSError("no route")
        with pytest.raises(OSError, match="no route"):
            self.dial(loop, network, 80)


class TestReading:
    """What the program reads."""

    @given(data=st.binary(min_size=1, max_size=60), cuts=st.lists(st.integers(0, 60), max_size=6))
    def test_data_arrives_whole_one_piece_a_turn(self, data: bytes, cuts: list[int]) -> None:
        with closing(SimulatedLoop()) as loop:
            program = Program()
            remote = MemoryNetwork(loop).client(lambda: program)
            remote.send(data, *sorted(cut for cut in cuts if cut < len(data)))
            assert not program.reads, "delivered before the loop ran"
            loop.run_ready()
            assert b"".join(program.reads) == data and all(program.reads)
            assert remote.work.reads == len(program.reads) and remote.work.turn_reads_max == 1

    def test_bytewise(self, loop: SimulatedLoop, remote: RemoteEnd, program: Program) -> None:
        remote.send_bytewise(b"abc")
        loop.run_ready()
        assert program.reads == [b"a", b"b", b"c"]

    def test_a_read_is_no_larger_than_a_sockets(self, loop: SimulatedLoop, remote: RemoteEnd, program: Program) -> None:
        remote.send(bytes(READ_BYTES_MAX + 1))
        loop.run_ready()
        assert [len(read) for read in program.reads] == [READ_BYTES_MAX, 1]

    def test_a_paused_program_reads_nothing(self, loop: SimulatedLoop, remote: RemoteEnd, program: Program) -> None:
        program.transport.pause_reading()
        remote.send(b"abc", 1)
        loop.run_ready()
        assert not program.reads and remote.unread_bytes == 3 and remote.is_paused
        program.transport.resume_reading()
        assert not program.reads, "resume_reading itself delivers nothing"
        loop.run_ready()
        assert program.reads == [b"a", b"bc"] and not remote.unread_bytes and not remote.is_paused

    def test_a_program_that_pauses_in_a_read_gets_no_other(
        self, loop: SimulatedLoop, remote: RemoteEnd, program: Program, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(program, "data_received", lambda data: program.transport.pause_reading())
        remote.send(b"abc", 1, 2)
        loop.run_ready()
        assert remote.work.reads == 1 and remote.unread_bytes == 2

    def test_a_regular_end_closes(self, loop: SimulatedLoop, remote: RemoteEnd, program: Program) -> None:
        remote.send(b"last")
        remote.end()
        loop.run_ready()
        assert program.reads == [b"last"] and program.calls == ["eof"] and program.lost is None
        assert remote.is_closed and not remote.is_aborted

    def test_a_program_may_keep_its_own_direction_open(
        self, loop: SimulatedLoop, remote: RemoteEnd, program: Program
    ) -> None:
        program.half_close = True
        remote.end()
        loop.run_ready()
        assert program.lost == "not lost"
        program.transport.write(b"answer")
        program.transport.write_eof()
        assert remote.read_all() == b"answer" and remote.has_eof

    def test_a_reset_loses_what_was_not_read(self, loop: SimulatedLoop, remote: RemoteEnd, program: Program) -> None:
        remote.send(b"lost")
        remote.reset()
        program.transport.write(b"nothing")
        loop.run_ready()
        assert not program.reads and isinstance(program.lost, ConnectionResetError) and not remote.received
        remote.send(b"more")
        remote.reset()
        loop.run_ready()
        assert not program.reads


class TestWriting:
    """What the other end gets."""

    def test_writes_are_taken_at_once(self, remote: RemoteEnd, program: Program) -> None:
        seen: list[bytes] = []
        remote.on_received = lambda end: seen.append(bytes(end.received))
        program.transport.write(b"ab")
        program.transport.writelines([b"c", b"d"])
        assert seen == [b"ab", b"abcd"] and remote.read_all() == b"abcd" and not remote.received

    def test_an_end_that_does_not_read_fills_the_buffer(self, remote: RemoteEnd, program: Program) -> None:
        program.transport.set_write_buffer_limits(high=10)
        assert isinstance(program.transport, MemoryTransport)
        assert program.transport.get_write_buffer_limits() == (2, 10)
        remote.stop_reading(after_bytes=4)
        program.transport.write(b"0123456789")
        assert remote.received == b"0123" and remote.unsent_bytes == 6 and not program.calls
        program.transport.write(b"abcdefgh")
        assert program.calls == ["pause"] and program.transport.get_write_buffer_size() == 14
        assert remote.held_bytes == 14
        remote.start_reading()
        assert remote.received == b"0123456789abcdefgh" and program.calls == ["pause", "resume"]

    def test_close_sends_what_is_unsent_first(self, loop: SimulatedLoop, remote: RemoteEnd, program: Program) -> None:
        remote.stop_reading()
        program.transport.write(b"last")
        program.transport.close()
        program.transport.write(b"too late")
        loop.run_ready()
        assert program.transport.is_closing() and program.lost == "not lost" and not remote.is_closed
        remote.start_reading()
        loop.run_ready()
        assert remote.received == b"last" and program.lost is None and remote.is_closed

    def test_abort_closes_at_once_and_reports_in_the_next_turn(
        self, loop: SimulatedLoop, remote: RemoteEnd, program: Program
    ) -> None:
        remote.stop_reading()
        remote.send(b"never read")
        program.transport.write(b"never sent")
        program.transport.abort()
        assert remote.is_closed and remote.is_aborted and program.lost == "not lost"
        program.transport.abort()
        program.transport.close()
        loop.run_ready()
        assert program.lost is None and not remote.received and not program.reads

    def test_another_protocol_takes_over(self, loop: SimulatedLoop, remote: RemoteEnd, program: Program) -> None:
        other = Program()
        program.transport.set_protocol(other)
        assert program.transport.get_protocol() is other
        remote.send(b"x")
        loop.run_ready()
        assert other.reads == [b"x"] and not program.reads


class TestCounting:
    """Bytes looked at, and bytes held."""

    def test_each_look_is_counted(self) -> None:
        work = Work()
        data = CountedBytes(b"0123456789", work)
        for look, bytes_looked_at in (
            (lambda: data.find(b"4"), 5),
            (lambda: data.find(b"x"), 10),
            (lambda: data.find(b"4", 3, 8), 2),
            (lambda: data.find(0x34), 5),
            (lambda: data.rfind(b"7"), 3),
            (lambda: data.count(b"1", 5), 5),
            (lambda: data[2:5], 3),
            (lambda: data[2], 1),
            (lambda: data + b"ab", 12),
            (lambda: b"ab" + data, 12),
            (lambda: operator.contains(data, b"3"), 10),
            (lambda: data.isascii(), 10),
            (lambda: data.decode(), 10),
            (lambda: data.split(b"3"), 10),
            (lambda: data.partition(b"3"), 10),
            (lambda: data.replace(b"3", b""), 10),
            (lambda: data.lower(), 10),
            (lambda: data.strip(), 10),
        ):
            before = work.looked_at_bytes
            look()
            assert work.looked_at_bytes - before == bytes_looked_at

    @given(data=st.binary(max_size=20), other=st.binary(max_size=5), at=st.integers(-25, 25), end=st.integers(-25, 25))
    def test_it_is_the_same_as_bytes(self, data: bytes, other: bytes, at: int, end: int) -> None:
        counted = CountedBytes(data, Work())
        assert counted == data and counted[at:end] == data[at:end]
        assert counted.find(other, at, end) == data.find(other, at, end)
        assert counted.rfind(other, at, end) == data.rfind(other, at, end)
        assert counted.count(other, at, end) == data.count(other, at, end)
        assert counted + other == data + other and other + counted == other + data
        assert operator.contains(counted, other) == operator.contains(data, other)
        grown = bytearray(other)
        grown += counted
        assert type(grown) is bytearray and grown == other + data
        assert isinstance(counted[at:end], CountedBytes) and isinstance(other + counted, CountedBytes)
        assert bytes(counted) == data and b"%b" % counted == data and b"".join([counted, counted]) == data * 2

    def test_a_parser_that_looks_again_and_again_is_found_out(self, loop: SimulatedLoop) -> None:
        class Careless(Program):
            """It searches all that it has, at each read."""

            buffer = b""

            def data_received(self, data: bytes) -> None:
                self.buffer += data
                self.buffer.find(b"\n")

        class Careful(Program):
            """It searches what is new."""

            def data_received(self, data: bytes) -> None:
                self.reads.append(data)
                data.find(b"\n")

        looked_at = {}
        for program in (Careless(), Careful()):
            remote = MemoryNetwork(loop).client(partial(Program.itself, program))
            remote.send_bytewise(bytes(300))
            loop.run_ready()
            looked_at[type(program)] = remote.work.looked_at_bytes
            assert remote.held_bytes == 300
        assert looked_at[Careful] == 300
        assert looked_at[Careless] > 300 * 300 / 2

    def test_what_is_freed_is_not_held(self, loop: SimulatedLoop, remote: RemoteEnd, program: Program) -> None:
        remote.send(bytes(1000))
        loop.run_ready()
        assert remote.held_bytes == 1000
        program.reads[0] = program.reads[0][:10]
        assert remote.held_bytes == 10
        program.reads.clear()
        assert remote.held_bytes == 0
