"""Damaged requests over real sockets: the wall's count of requests is the oracle. faults.md row 30.

What must reach it, a second reader says; what reaches it beside that was smuggled.
"""

import os
import random
from collections.abc import Iterator

import pytest

from tests.fuzz import strict_http
from tests.fuzz.edge import ATTACKS, EXAMPLES, METHODS, TOKENS, served
from tests.fuzz.mutation import Mutator
from tests.fuzz.strict_http import Item, Reading
from tests.loopback.wall_client import Client
from tests.loopback.wall_rig import Plane, plane

INPUTS = int(os.environ.get("FLEETGATE_FUZZ_INPUTS", "3000")) // 5
SEED = int(os.environ.get("FLEETGATE_SEED", "1"))


@pytest.fixture(scope="module")
def edge() -> Iterator[Plane]:
    with plane() as made:
        yield made


def clear(reading: Reading) -> bool:
    """Whether how many requests are served does not depend on how the kernel cuts the bytes."""
    return not any(item.denied and (item.has_body or item.method not in METHODS) for item in reading.items)


def wanted(items: list[Item]) -> list[bytes]:
    """The bodies that must reach the wall, in order; with HTTP/1.0 a stream ends the connection."""
    bodies: list[bytes] = []
    for item in items:
        if served(item):
            bodies.append(item.body)
            if item.http10 and b"stream" in item.body:
                break
    return bodies


def answers_of(client: Client, reading: Reading) -> int:
    """Read as many answers as there must be, and then until the end if there must be one."""
    count, expected = 0, len(reading.items) + (reading.end == "refused")
    while count < expected:
        head = client.read(head_only=count < len(reading.items) and reading.items[count].method == b"HEAD")
        assert head.status != 500
        count += 1
    if reading.end != "open":
        client.closed()
    return count


def test_row_30_nothing_is_smuggled_through_real_sockets(edge: Plane) -> None:
    sent = 0
    edge.wall.forget()
    expected: list[bytes] = []
    for number in range(INPUTS):
        rng = random.Random(f"sockets {SEED} {number}")
        mutator = Mutator(rng, TOKENS)
        data = mutator.damage(rng.choice(EXAMPLES if rng.random() < 0.6 else ATTACKS))
        data += mutator.damage(rng.choice(EXAMPLES)) if rng.random() < 0.4 else b""
        reading = strict_http.read_requests(data)
        if not clear(reading):
            continue
        sent += 1
        with edge.client() as client:
            for piece in mutator.cut(data):
                client.send(piece)
            answers_of(client, reading)
        expected += wanted(reading.items)
        assert [seen.body for seen in edge.wall.seen] == expected, (number, data)
    edge.wait_idle()
    assert [seen.body for seen in edge.wall.seen] == expected
    assert sent > INPUTS / 2
