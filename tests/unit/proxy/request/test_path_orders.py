"""Any behaviour of engines, clients and clock on a data plane: nothing is left, and no cut answer looks whole."""

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from fleetgate.core.model import Admission, Resilience
from fleetgate.protocols.http1 import ChunkedBody
from fleetgate.proxy.transport.memory_network import RemoteEnd
from tests.conformance.transport_rig import BODY, DONE, FINISH, ROLE, STREAM_HEAD, chunked, content, streamed, whole
from tests.unit.proxy.plane_rig import Plane, plane_in

LIMIT = {"concurrency_max": 2, "concurrency_written": True}
ENGINE_SAYS = (
    STREAM_HEAD,
    chunked(ROLE),
    chunked(content("a")),
    chunked(FINISH, DONE) + b"0\r\n\r\n",
    streamed(ROLE, content("a"), FINISH, DONE),
    whole(BODY),
    whole(b"{}", b"500 Internal Server Error"),
    whole(b'{"error":{"message":"busy"}}', b"429 Too Many Requests"),
    b"garbage\r\n\r\n",
)
STEPS = st.lists(st.tuples(st.integers(0, 11), st.integers(0, 1000)), min_size=10, max_size=50)


class Play:
    """Clients and engines that do anything."""

    def __init__(self, plane: Plane) -> None:
        self.plane = plane
        self.clients: list[RemoteEnd] = []

    def step(self, kind: int, choice: int) -> None:
        plane = self.plane
        engines = [one for engine in plane.engines for one in engine.connections if not one.is_closed]
        open_clients = [client for client in self.clients if not client.is_closed]
        if kind < 3 and len(self.clients) < 8:
            fields = {"temperature": 0, "seed": 1} if choice % 3 == 0 else {}
            self.clients.append(plane.ask(choice % 2 == 0, **fields))  # type: ignore[arg-type]
        elif kind < 8 and engines:
            plane.answer(engines[choice % len(engines)], ENGINE_SAYS[choice // 7 % len(ENGINE_SAYS)])
        elif kind == 8 and engines:
            engine = engines[choice % len(engines)]
            engine.reset() if choice % 2 else engine.end()
        elif kind == 9 and open_clients:
            client = open_clients[choice % len(open_clients)]
            client.reset() if choice % 2 else client.stop_reading()
        elif kind == 10:
            listener = plane.engines[choice % 2]
            listener.error = ConnectionRefusedError("refused") if listener.error is None else None
        elif kind == 11:
            plane.wait((0.1, 2.0, 16.0)[choice % 3])
        plane.run()

    def end(self) -> None:
        for client in self.clients:
            client.start_reading()
            self.plane.run()
            if client.is_closed and client.received:
                self.check(client)
            client.reset()
        self.plane.run()

    @staticmethod
    def check(client: RemoteEnd) -> None:
        """An answer on a connection that was closed is whole, or says that it is not, or was reset."""
        head, mark, body = bytes(client.received).partition(b"\r\n\r\n")
        if client.is_aborted or not mark or b"transfer-encoding: chunked" not in head:
            return
        framing = ChunkedBody()
        payload = framing.feed(body)
        assert not framing.done or DONE in payload or b'"error"' in payload


@given(steps=STEPS)
@settings(max_examples=25)
def test_whatever_engines_and_clients_do_nothing_is_left(steps: list[tuple[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder, plane_in(Path(folder)) as plane:
        plane.take(each=LIMIT, admission=Admission(queue_max=2), resilience=Resilience(hedge="all"))
        play = Play(plane)
        for kind, choice in steps:
            play.step(kind, choice)
        play.end()
        assert plane.metric("fleetgate_internal_errors_total") == 0


@given(cuts=st.lists(st.integers(1, 600), max_size=30, unique=True).map(sorted), stream=st.booleans())
@settings(max_examples=20)
def test_however_an_answer_is_cut_the_client_gets_the_same(cuts: list[int], stream: bool) -> None:
    events = (ROLE, content("a"), content("é→😀"), content("c"), FINISH, DONE)
    data = streamed(*events) if stream else whole(BODY)
    with tempfile.TemporaryDirectory() as folder, plane_in(Path(folder)) as plane:
        client, engine = plane.ask(stream), plane.engine(0)
        engine.send(data, *(cut for cut in cuts if cut < len(data)))
        plane.run()
        body = bytes(client.received).partition(b"\r\n\r\n")[2]
        assert (ChunkedBody().feed(body) if stream else body) == (b"".join(events) if stream else BODY)
        assert engine.work.turn_reads_max == 1 and not engine.work.held_bytes
        assert engine.work.looked_at_bytes < 12 * len(data) * (1 + len(cuts))
