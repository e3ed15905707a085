"""A whole worker's data plane on the in-memory network: a client at one end, engines at the other, and no socket."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetgate.core.model import Snapshot
from fleetgate.ipc.signed_file import public_key
from fleetgate.proxy.downstream.client_connection import ClientConnection
from fleetgate.proxy.transport.memory_network import MemoryListener, MemoryNetwork, RemoteEnd, SimulatedLoop
from fleetgate.proxy.worker.config import WorkerConfig
from fleetgate.proxy.worker.worker import WorkerProcess
from fleetgate.supervisor.supervisor import create_shared_memory
from tests.conformance.transport_rig import BODY, DONE, FINISH, ROLE, STREAM_HEAD, chunked, content, streamed, whole
from tests.loopback.rig import deployment, gateway

PORTS = (8001, 8002)


class Plane:
    """Deployments `one` and `two` behind the Gateway `chat.test`, in this order of rank."""

    def __init__(self, data_dir: Path) -> None:
        for name, key in (("seal.key", b"s" * 32), ("pepper", b"p" * 32), ("signing.pub", public_key(b"k" * 32))):
            (data_dir / name).write_bytes(key)
        board_fd, self.board = create_shared_memory(1)
        config = WorkerConfig(
            index=0, workers=1, data_dir=str(data_dir), board_fd=board_fd, listen_fd=-1, auth="none", access_log="off"
        )
        self.loop = SimulatedLoop()
        self.network = MemoryNetwork(self.loop)
        self.engines: list[MemoryListener] = [self.network.listen(port) for port in PORTS]
        self._plane = WorkerProcess(config).start_plane(self.loop, self.network)
        deployments = (deployment("one", PORTS[0], 0), deployment("two", PORTS[1], 1))
        site = gateway("one", "two", default=True)
        self._plane.snapshots.take(Snapshot(version=1, made_at_s=0.0, gateways=(site,), deployments=deployments))

    def ask(self, stream: bool) -> RemoteEnd:
        """A client connects and sends a request."""
        client = self.network.client(lambda: ClientConnection(self._plane.connection_services, self.loop))
        ask = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **({"stream": True} if stream else {})}
        body = json.dumps(ask).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: chat.test\r\ncontent-length: %d\r\n\r\n" % len(body)
        client.send(head + body)
        self.loop.run_ready()
        return client

    def in_flight(self) -> int:
        """The slots that are taken."""
        return sum(self.board.in_flight_total(slot) for slot in (0, 1))


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    made = Plane(tmp_path)
    yield made
    made.loop.close()


def test_a_stream_goes_through_event_by_event(plane: Plane) -> None:
    client = plane.ask(stream=True)
    (engine,) = plane.engines[0].connections
    assert b'"stream": true' in engine.received and plane.in_flight() == 1
    engine.send(STREAM_HEAD + chunked(ROLE))
    plane.loop.run_ready()
    assert not client.received, "a role is no content, and the request could still move"
    engine.send(chunked(content("a")))
    plane.loop.run_ready()
    assert client.received.startswith(b"HTTP/1.1 200 OK\r\n") and client.received.endswith(chunked(ROLE + content("a")))
    client.read_all()
    engine.send(chunked(content("b")))
    plane.loop.run_ready()
    assert client.read_all() == chunked(content("b"))
    engine.send(chunked(FINISH, DONE) + b"0\r\n\r\n")
    plane.loop.run_ready()
    assert client.read_all().endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") and plane.in_flight() == 0


def test_a_refused_request_moves_to_the_next_deployment(plane: Plane) -> None:
    plane.engines[0].error = ConnectionRefusedError("refused")
    client = plane.ask(stream=False)
    (engine,) = plane.engines[1].connections
    engine.send(whole(BODY))
    plane.loop.run_ready()
    assert client.received.startswith(b"HTTP/1.1 200 OK") and b"x-fleetgate-deployment: two" in client.received
    assert client.received.endswith(BODY) and plane.in_flight() == 0


def test_a_client_that_leaves_frees_its_engine_at_once(plane: Plane) -> None:
    client = plane.ask(stream=True)
    (engine,) = plane.engines[0].connections
    client.reset()
    plane.loop.run_ready()
    assert engine.is_aborted and plane.in_flight() == 0


def test_a_client_that_does_not_read_pauses_its_engine(plane: Plane) -> None:
    client = plane.ask(stream=True)
    client.stop_reading()
    (engine,) = plane.engines[0].connections
    engine.send(STREAM_HEAD + chunked(ROLE, content("a")))
    plane.loop.run_ready()
    sent = 0
    while not engine.is_paused and sent < 10_000:
        engine.send(chunked(content("x" * 1000)))
        plane.loop.run_ready()
        sent += 1
    assert engine.is_paused and client.unsent_bytes < 2_000_000
    client.start_reading()
    plane.loop.run_ready()
    assert not engine.is_paused and not client.unsent_bytes


def test_what_a_worker_looks_at_is_counted(plane: Plane) -> None:
    client = plane.ask(stream=True)
    (engine,) = plane.engines[0].connections
    engine.send(STREAM_HEAD + chunked(content("a")))
    plane.loop.run_ready()
    before, event = engine.work.looked_at_bytes, chunked(content("x" * 4000))
    engine.send(event)
    plane.loop.run_ready()
    assert client.received.endswith(event)
    looked_at_times = (engine.work.looked_at_bytes - before) / len(event)
    assert 2 < looked_at_times < 8, "a few searches and one look for UTF-8"
    assert engine.work.turn_reads_max == 1 and engine.held_bytes < 1_000, "nothing is kept of an event"


def test_a_kept_connection_serves_the_next_request(plane: Plane) -> None:
    for number in range(1, 6):
        client = plane.ask(stream=True)
        (engine,) = plane.engines[0].connections
        assert engine.received.count(b"POST ") == number
        engine.send(streamed(content("a"), FINISH, DONE))
        plane.loop.run_ready()
        assert client.received.endswith(b"0\r\n\r\n")
    assert plane.engines[0].dials == 1
