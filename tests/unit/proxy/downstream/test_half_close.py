"""A client that has sent a FIN while its answer is due: probed with bytes that no reader notices."""

from collections.abc import Iterator

import pytest

from fleetgate.proxy.downstream.half_close import RESPONSE_START, UNACKED_MAX_S, ResponseStart
from fleetgate.proxy.transport import tcp_info
from fleetgate.proxy.transport.tcp_info import CLOSE_WAIT, TcpInfo
from tests.conformance.transport_rig import BODY, STREAM_HEAD, chunked, content, whole
from tests.unit.proxy.plane_rig import Plane


class Kernel:
    """What the kernel says of the connection."""

    def __init__(self) -> None:
        self.info: TcpInfo | None = TcpInfo(CLOSE_WAIT, 0, 1)

    def read(self, transport: object) -> TcpInfo | None:
        return self.info


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    made = Kernel()
    monkeypatch.setattr(tcp_info, "read_tcp_info", made.read)
    yield made


def test_a_client_that_waits_gets_its_answer_whole(plane: Plane, kernel: Kernel) -> None:
    client = plane.ask()
    client.end()
    plane.wait(3.0)
    assert not client.is_closed and RESPONSE_START.startswith(bytes(client.received)) and client.received
    plane.answer(plane.engine(0), whole(BODY))
    assert client.received.startswith(b"HTTP/1.1 200 OK\r\n") and client.received.endswith(BODY)
    assert client.received.count(b"HTTP/1.1") == 1 and client.is_closed


def test_a_client_that_has_left_frees_its_engine(plane: Plane, kernel: Kernel) -> None:
    client = plane.ask()
    client.end()
    kernel.info = TcpInfo(7, 0, 1)  # closed: its reset has come
    plane.wait(0.1)
    assert client.is_closed and plane.engine(0).is_aborted and not plane.in_flight()


def test_a_client_whose_network_is_gone_acknowledges_nothing(plane: Plane, kernel: Kernel) -> None:
    client = plane.ask()
    kernel.info = TcpInfo(CLOSE_WAIT, 1, 1)
    client.end()
    plane.wait(UNACKED_MAX_S - 1.0)
    assert not client.is_closed
    plane.wait(3.0)
    assert client.is_closed and plane.engine(0).is_aborted


def test_a_stream_that_is_silent_is_probed_with_a_comment(plane: Plane, kernel: Kernel) -> None:
    client = plane.ask(stream=True)
    plane.answer(plane.engine(0), STREAM_HEAD + chunked(content("a")))
    client.end()
    client.read_all()
    plane.wait(3.0)
    assert client.received.startswith(chunked(b":\n\n")) and not client.is_closed
    client.reset()
    plane.run()


def test_what_began_as_an_answer_does_not_go_on_as_something_else(plane: Plane) -> None:
    class Transport:
        def __init__(self) -> None:
            self.data, self.aborted = b"", False

        def write(self, data: bytes) -> None:
            self.data += data

        def abort(self) -> None:
            self.aborted = True

    transport = Transport()
    start = ResponseStart(transport)  # type: ignore[arg-type]
    for _ in range(20):
        start.probe()
    assert transport.data == RESPONSE_START
    start.write(b"garbage")
    assert transport.aborted and transport.data == RESPONSE_START
