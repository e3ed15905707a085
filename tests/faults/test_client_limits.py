"""Too much at once: connections, descriptors, bodies, memory. FAULTS.md rows 28, 31, 69 and 70."""

import asyncio
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fleetgate.ipc.machine_status import OverloadBits
from fleetgate.ipc.shared_memory import WorkerCell
from fleetgate.proxy.overload.memory_pressure import MemoryPressure
from tests.loopback.test_edge_keys import GOOD, KEYS, SCOPED, publish
from tests.loopback.wall import Line, Seen
from tests.loopback.wall_client import PATH, Answer, Client, request
from tests.loopback.wall_replies import CHUNKED, EVENT_STREAM, chunk, role, tokens
from tests.loopback.wall_rig import EVERY_MODEL, Plane, plane
from tests.waiting import wait_for

MIB = 1024 * 1024
GROUPS = Path("/sys/fs/cgroup/memory")


def status_bytes(made: Plane, name: str) -> int:
    """One row of what the kernel tells of the first worker's memory."""
    status = Path(f"/proc/{made.rig.processes[0].pid}/status").read_text()
    match = re.search(rf"{name}:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024


def descriptors(made: Plane) -> int:
    """How many the first worker has."""
    return len(list(Path(f"/proc/{made.rig.processes[0].pid}/fd").iterdir()))


def cpu_s(made: Plane) -> float:
    """What the first worker has used of its core so far."""
    words = Path(f"/proc/{made.rig.processes[0].pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def from_address(port: int, address: str) -> Client:
    """A client at another loopback address."""
    client = Client(port)
    client.socket.close()
    client.socket = socket.create_connection(("127.0.0.1", port), timeout=30, source_address=(address, 0))
    return client


# --- bodies -----------------------------------------------------------------------------------------------------------


def test_row_28_a_body_of_a_gibibyte_is_413_and_costs_no_memory() -> None:
    with plane() as made:
        made.ask(request("m"))
        before = status_bytes(made, "VmHWM")
        with made.client() as client:
            client.send(f"POST {PATH} HTTP/1.1\r\nHost: chat.test\r\nContent-Length: {1024 * MIB}\r\n\r\n".encode())
            assert (client.read().status) == 413
        with made.client() as client:
            client.send(f"POST {PATH} HTTP/1.1\r\nHost: chat.test\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
            for _ in range(64):
                client.send(b"100000\r\n" + b" " * MIB + b"\r\n")
            assert client.read().status == 413
        assert status_bytes(made, "VmHWM") - before < 64 * MIB
        assert len(made.wall.seen) == 1


@pytest.mark.parametrize("chunked", [False, True])
def test_row_28_bodies_share_a_budget(chunked: bool) -> None:
    """What is over it is 503 at once, what is under it goes on, and all of it is there again afterwards."""
    with plane(body_budget_bytes=10 * MIB) as made:
        size = 4 * MIB
        body = b'{"model":"m","x":"' + b"y" * size + b'"}'
        frame = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
        head = f"POST {PATH} HTTP/1.1\r\nHost: chat.test\r\n{frame}\r\n\r\n".encode()
        whole = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body
        for _ in range(3):
            clients = [made.client() for _ in range(2)]
            for client in clients:
                client.send(head + whole[:-10])
            wait_for(lambda: made.rig.board.get(0, WorkerCell.CONNECTIONS) == 2)
            wait_for(lambda: made.rig.board.get(0, WorkerCell.SHORT) == 0)
            time.sleep(0.3)  # until they have been read
            with made.client() as third:
                third.send(head + whole[:-10])
                answer = third.read()
                assert (answer.status, answer.code) == (503, "overloaded")
                assert answer.headers["retry-after"] == "1" and answer.headers["x-should-retry"] == "true"
            assert made.ask(request("m")).status == 200, "a small one needs no budget"
            for client in clients:
                client.send(whole[-10:])
                assert client.read().status == 200
                client.socket.close()
            with made.client() as left:  # one that leaves in the middle gives its part back too
                left.send(head + whole[:-10])
            wait_for(lambda: made.rig.board.get(0, WorkerCell.CONNECTIONS) == 0)


def test_row_31_an_early_refusal_ends_the_connection_whatever_still_comes() -> None:
    with plane() as made, made.client() as client:
        head = f"POST {PATH} HTTP/1.1\r\nHost: chat.test\r\nContent-Length: {30 * MIB}\r\n\r\n"
        client.send(head.encode() + b"x" * MIB)
        answer = client.read()
        assert answer.status == 413 and answer.headers["connection"] == "close"
        client.send(request("m"))
        assert client.closed(5.0)
        assert not made.wall.seen


# --- connections ------------------------------------------------------------------------------------------------------


def refused_at(clients: list[Client]) -> list[Answer]:
    """The answers of those that were refused before they asked."""
    return [client.read() for client in clients]


def test_row_4_connections_of_one_address_are_bounded_and_others_are_not() -> None:
    with plane(ip_connections_max=5) as made:
        clients = [made.client() for _ in range(5)]
        assert {client.ask(request("m")).status for client in clients} == {200}
        for answer in refused_at([made.client() for _ in range(3)]):
            assert (answer.status, answer.code) == (429, "rate_limited")
            assert "--ip-connections-max" in answer.json()["error"]["message"]
        others = [from_address(made.port, "127.0.0.2") for _ in range(5)]
        assert {client.ask(request("m")).status for client in others} == {200}
        assert {client.ask(request("m")).status for client in clients} == {200}
        for client in (*clients, *others):
            client.socket.close()
        wait_for(lambda: made.rig.board.get(0, WorkerCell.CONNECTIONS) == 0)
        assert made.ask(request("m")).status == 200


def test_row_4_load_balancers_speak_for_many_so_private_addresses_are_not_bounded_by_themselves() -> None:
    with plane() as made:
        clients = [made.client() for _ in range(700)]
        assert {client.ask(request("m")).status for client in clients[::50]} == {200}
        for client in clients:
            client.socket.close()


def test_row_4_connections_of_one_key_are_bounded() -> None:
    with plane(auth="keys", key_connections_max=3) as made:
        publish(made, KEYS)
        data = request("m", headers=[f"Authorization: Bearer {GOOD}"])
        clients = [made.client() for _ in range(3)]
        for _ in range(2):
            assert {client.ask(data).status for client in clients} == {200}
        with made.client() as fourth:
            answer = fourth.ask(data)
            assert (answer.status, answer.code) == (429, "rate_limited")
            assert "--key-connections-max" in answer.json()["error"]["message"]
        with made.client() as other:
            assert other.ask(request("m", headers=[f"Authorization: Bearer {SCOPED}"])).status == 200
            assert other.ask(data).status == 429, "it changed its key"
        clients.pop().socket.close()
        wait_for(lambda: made.rig.board.get(0, WorkerCell.CONNECTIONS) == 2)
        with made.client() as fourth:
            assert fourth.ask(data).status == 200
        for client in clients:
            client.socket.close()


# --- descriptors and memory -------------------------------------------------------------------------------------------


@contextmanager
def limited(line: str, **options: object) -> Iterator[Plane]:
    """A worker that begins with one more line of Python, and streams that run in it."""
    with plane(patience={"fleetgate.__doc__": line}, **options) as made:  # type: ignore[arg-type]
        made.wall.replies["endless"] = paced
        made.use({"models": {**EVERY_MODEL, "endless": "endless"}})
        yield made


async def paced(line: Line, seen: Seen) -> None:
    """Content, for as long as anybody wants it, ten times a second."""
    line.write(EVENT_STREAM + CHUNKED + chunk(role("m")))
    while not line.gone.is_set():
        line.write(chunk(tokens("m", 1)[0]))
        await asyncio.sleep(0.1)


def descriptor_limit(count: int) -> str:
    return f"__import__('resource').setrlimit(__import__('resource').RLIMIT_NOFILE, ({count}, {count}))"


@contextmanager
def streams(made: Plane, count: int) -> Iterator[list[Client]]:
    """Running streams; at the end each must be running still."""
    clients = [made.client() for _ in range(count)]
    for client in clients:
        client.send(request("endless", stream=True))
    for client in clients:
        client.read_until(b"tok")
    yield clients
    for client in clients:
        while client.buffered:
            client._buffer = b""
        client.read_until(b"tok")
        client.socket.close()


def flood(port: int, count: int) -> list[socket.socket]:
    """Connections that say nothing."""
    opened = []
    for _ in range(count):
        each = socket.socket()
        each.setblocking(False)
        each.connect_ex(("127.0.0.1", port))
        opened.append(each)
    return opened


@pytest.mark.parametrize("connections_max", [0, 1000])
def test_row_69_without_descriptors_streams_live_nothing_spins_and_it_passes(connections_max: int) -> None:
    """Once by our own cap, at half the limit; once with a cap that is far too high, so that accept itself fails."""
    with limited(descriptor_limit(256), connections_max=connections_max) as made, streams(made, 20):
        assert made.ask(request("m")).status == 200
        opened = flood(made.port, 600)
        wait_for(lambda: bool(made.rig.board.get(0, WorkerCell.SHORT) & OverloadBits.CONNECTIONS))
        assert descriptors(made) < 256
        before_s = cpu_s(made)
        time.sleep(2.0)
        assert cpu_s(made) - before_s < 1.0, "it spins"
        assert made.rig.processes[0].poll() is None
        for each in opened:
            each.close()
        wait_for(lambda: not made.rig.board.get(0, WorkerCell.SHORT))
        assert [made.ask(request("m")).status for _ in range(20)] == [200] * 20


def test_row_69_who_comes_when_it_is_nearly_full_is_told() -> None:
    """And idle connections make room for those that ask."""
    with plane(connections_max=100) as made:
        idle = [made.client() for _ in range(90)]
        assert {client.ask(request("m")).status for client in idle} == {200}
        wait_for(lambda: made.rig.board.get(0, WorkerCell.CONNECTIONS) < 50)
        assert made.ask(request("m")).status == 200
        silent = [made.client() for _ in range(94)]
        answer = made.client().read()
        assert (answer.status, answer.code) == (503, "overloaded")
        assert answer.headers["x-should-retry"] == "true" and answer.headers["connection"] == "close"
        for client in (*idle, *silent):
            client.socket.close()
        wait_for(lambda: made.rig.board.get(0, WorkerCell.CONNECTIONS) == 0)
        assert made.ask(request("m")).status == 200


@pytest.fixture
def group() -> Iterator[Path]:
    """A cgroup of version 1 with 256 MiB, which this test makes and removes."""
    made = GROUPS / f"fleetgate-test-{os.getpid()}"
    try:
        made.mkdir()
        (made / "memory.limit_in_bytes").write_text(str(256 * MIB))
    except OSError as error:
        pytest.skip(f"needs root and a cgroup of version 1 to make its own: {error}")
    yield made
    wait_for(lambda: not (made / "cgroup.procs").read_text().split())
    made.rmdir()


def test_row_70_short_of_memory_new_requests_get_503_and_streams_live(group: Path) -> None:
    line = f"open({str(group / 'cgroup.procs')!r}, 'w').write(str(__import__('os').getpid()))"
    with limited(line, body_budget_bytes=600 * MIB) as made, streams(made, 5):
        assert made.rig.processes[0].pid == int((group / "cgroup.procs").read_text().split()[0])
        bodies: list[Client] = []
        while not made.rig.board.get(0, WorkerCell.SHORT) & OverloadBits.MEMORY:
            assert len(bodies) < 40, "nothing was shed before it ran out"
            client = made.client()
            client.send(f"POST {PATH} HTTP/1.1\r\nHost: chat.test\r\nContent-Length: {8 * MIB}\r\n\r\n".encode())
            client.send(b" " * (8 * MIB - 1))
            bodies.append(client)
            time.sleep(0.3)
        statuses = Counter(made.ask(request("m")).status for _ in range(200))
        assert statuses[503] > 0 and set(statuses) <= {200, 503}, statuses
        for client in bodies:
            client.socket.close()
        wait_for(lambda: not made.rig.board.get(0, WorkerCell.SHORT))
        assert [made.ask(request("m")).status for _ in range(50)] == [200] * 50
        assert made.rig.processes[0].poll() is None


@pytest.mark.parametrize("version", [1, 2])
def test_row_70_the_smallest_limit_above_the_process_counts_and_cached_files_do_not(
    tmp_path: Path, version: int
) -> None:
    """Both versions of the kernel's files, as a container sees them; the live test above has only one of them."""
    names = ("memory.max", "memory.current", "") if version == 2 else (
        "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")  # fmt: skip
    root, proc = tmp_path / "cgroup", tmp_path / "proc"
    top = root if version == 2 else root / "memory"
    inner = top / "pods" / "one"
    (proc / "self").mkdir(parents=True)
    inner.mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/pods/one\n" if version == 2 else "4:memory:/pods/one\n0::/\n")
    (proc / "meminfo").write_text("MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n")
    for place, limit, used in ((inner, "max" if version == 2 else str(2**63 - 4096), 0), (inner.parent, 1000, 950)):
        (place / names[0]).write_text(f"{limit}\n")
        (place / names[1]).write_text(f"{used}\n")
        (place / "memory.stat").write_text(f"{names[2]}inactive_file 30\n{names[2]}active_file 20\n")
    memory = MemoryPressure(root, proc)
    assert memory.limit_bytes == 1000
    assert memory.shed_share() == pytest.approx(0.5)
    (inner.parent / names[1]).write_text("850\n")
    assert memory.shed_share() == 0.0
    (inner.parent / names[1]).write_text("1050\n")
    assert memory.shed_share() == 1.0


def test_row_70_without_a_limit_what_counts_is_what_the_machine_has_left(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("0::/\n")

    def share(left_mib: int) -> float:
        (tmp_path / "meminfo").write_text(f"MemTotal: 16777216 kB\nMemAvailable: {left_mib * 1024} kB\n")
        return MemoryPressure(tmp_path / "none", tmp_path).shed_share()

    assert share(300) == 0.0, "98 % used by others is no reason yet"
    assert share(176) == pytest.approx(0.5)
    assert share(90) == 1.0
