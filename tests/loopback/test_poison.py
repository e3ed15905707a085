"""A request that ends the engines that serve it is not tried on a third; one that only meets broken ones is."""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from tests.loopback.rig import deployment
from tests.loopback.wall_client import request
from tests.loopback.wall_rig import Plane, plane

FINE = b'{"id":"w","object":"chat.completion","created":1,"model":"m","choices":[]}'


class Mortal:
    """An engine that dies of a poisonous request: nobody listens there afterwards, and its connections break."""

    def __init__(self) -> None:
        self.asked = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                data = connection.recv(65536)
                if not data.startswith(b"POST"):
                    continue
                if b"poison" not in data:
                    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n"
                    connection.sendall(head + b"content-length: %d\r\n\r\n" % len(FINE) + FINE)
                else:
                    self.asked += 1
                    self.end()
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def end(self) -> None:
        """Nobody listens any more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture(scope="module")
def bed() -> Iterator[Plane]:
    with plane(walls=3) as made:
        yield made


@pytest.mark.parametrize("stream", [True, False])
def test_two_engines_die_of_it_and_the_third_is_not_risked(bed: Plane, stream: bool) -> None:
    mortals = [Mortal() for _ in range(3)]
    first = 300 + 10 * stream
    names = ("one", "two", "three")
    made = [deployment(name, one.port, first + n) for n, (name, one) in enumerate(zip(names, mortals, strict=True))]
    bed.slots = [one.slot for one in made]
    bed.publish(made)
    bed.publish(made, strategy="capacity_round_robin")
    for _ in range(6):  # each shows that it serves others
        assert bed.ask(request("m")).status == 200
    bed.rig.wait_a_look()
    answer = bed.ask(request("m", stream=stream, user="poison"))
    assert answer.status == 502 and answer.code == "poison_request"
    assert answer.headers["x-should-retry"] == "false"
    assert sorted(mortal.asked for mortal in mortals) == [0, 1, 1]
    for mortal in mortals:
        mortal.end()
    bed.wait_idle()


def test_engines_that_only_break_are_no_reason_to_stop(bed: Plane) -> None:
    bed.use(*({"models": {"m": name}} for name in ("rst-before", "rst-before", "ok")))
    answer = bed.ask(request("m"))
    assert answer.status == 200 and answer.headers["x-fleetgate-attempts"] == "3"
