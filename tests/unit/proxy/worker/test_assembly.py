"""A whole worker's data plane on the in-memory network: a client at one end, engines at the other, and no socket."""

from tests.conformance.transport_rig import BODY, DONE, FINISH, ROLE, STREAM_HEAD, chunked, content, streamed, whole
from tests.unit.proxy.plane_rig import Plane


def test_a_stream_goes_through_event_by_event(plane: Plane) -> None:
    client = plane.ask(stream=True)
    engine = plane.engine(0)
    assert b'"stream": true' in engine.received and plane.in_flight() == 1
    engine.send(STREAM_HEAD + chunked(ROLE))
    plane.run()
    assert not client.received, "a role is no content, and the request could still move"
    engine.send(chunked(content("a")))
    plane.run()
    assert client.received.startswith(b"HTTP/1.1 200 OK\r\n") and client.received.endswith(chunked(ROLE + content("a")))
    client.read_all()
    engine.send(chunked(content("b")))
    plane.run()
    assert client.read_all() == chunked(content("b"))
    engine.send(chunked(FINISH, DONE) + b"0\r\n\r\n")
    plane.run()
    assert client.read_all().endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") and plane.in_flight() == 0


def test_a_refused_request_moves_to_the_next_deployment(plane: Plane) -> None:
    plane.engines[0].error = ConnectionRefusedError("refused")
    client = plane.ask(stream=False)
    engine = plane.engine(1)
    engine.send(whole(BODY))
    plane.run()
    assert client.received.startswith(b"HTTP/1.1 200 OK") and b"x-fleetgate-deployment: two" in client.received
    assert client.received.endswith(BODY) and plane.in_flight() == 0


def test_a_client_that_leaves_frees_its_engine_at_once(plane: Plane) -> None:
    client = plane.ask(stream=True)
    engine = plane.engine(0)
    client.reset()
    plane.run()
    assert engine.is_aborted and plane.in_flight() == 0


def test_a_client_that_does_not_read_pauses_its_engine(plane: Plane) -> None:
    client = plane.ask(stream=True)
    client.stop_reading()
    engine = plane.engine(0)
    engine.send(STREAM_HEAD + chunked(ROLE, content("a")))
    plane.run()
    sent = 0
    while not engine.is_paused and sent < 10_000:
        engine.send(chunked(content("x" * 1000)))
        plane.run()
        sent += 1
    assert engine.is_paused and client.unsent_bytes < 2_000_000
    client.start_reading()
    plane.run()
    assert not engine.is_paused and not client.unsent_bytes
    client.reset()
    plane.run()


def test_what_a_worker_looks_at_is_counted(plane: Plane) -> None:
    client = plane.ask(stream=True)
    engine = plane.engine(0)
    engine.send(STREAM_HEAD + chunked(content("a")))
    plane.run()
    before, event = engine.work.looked_at_bytes, chunked(content("x" * 4000))
    engine.send(event)
    plane.run()
    assert client.received.endswith(event)
    looked_at_times = (engine.work.looked_at_bytes - before) / len(event)
    assert 2 < looked_at_times < 8, "a few searches and one look for UTF-8"
    assert engine.work.turn_reads_max == 1 and engine.held_bytes < 1_000, "nothing is kept of an event"
    client.reset()
    plane.run()


def test_a_kept_connection_serves_the_next_request(plane: Plane) -> None:
    for number in range(1, 6):
        client = plane.ask(stream=True)
        engine = plane.engine(0)
        assert engine.received.count(b"POST ") == number
        engine.send(streamed(content("a"), FINISH, DONE))
        plane.run()
        assert client.received.endswith(b"0\r\n\r\n")
    assert plane.engines[0].dials == 1
