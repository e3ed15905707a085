"""Stopping and changing under load: SIGTERM, a new configuration, a new certificate every second."""

import asyncio
import os
import socket
import ssl
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import httpx2
import trustme
import uvloop

from fleetgate.proxy.downstream.listener import Listener
from tests.faults.life_load import Load
from tests.faults.test_accounts import rows_of
from tests.faults.test_life_upgrade import running
from tests.loopback.engines import engine
from tests.loopback.up_rig import Up, deployment, gateway
from tests.loopback.wall import Wall
from tests.loopback.wall_client import Client, request
from tests.waiting import wait_for


def test_row_72_readiness_falls_first_and_nothing_is_refused_or_cut_inside_the_grace(tmp_path: Path) -> None:
    with running(tmp_path, "--lb-grace-s", "2") as up, Load(up.port, short=6, streams=20) as load:
        load.reconnects = True  # every request on a connection of its own: a refused one would show
        wait_for(lambda: load.outcomes["stream"] > 10)
        up.process.terminate()
        asked_s = time.monotonic()
        wait_for(lambda: not up.is_ready(), 1.0)
        fell_s = time.monotonic() - asked_s
        assert fell_s < 0.5, fell_s  # 100 ms is the target; the rest is what a busy machine takes to answer twice
        good = load.good
        time.sleep(max(0.0, 1.5 - (time.monotonic() - asked_s)))
        load.stop()  # as a load balancer does that has seen readiness fall; its streams go on to their ends
        assert load.good > good + 20
        assert not load.bad, load.bad
        assert up.process.wait(30) == 0
        print(f"readiness fell after {fell_s * 1000:.0f} ms, {load.outcomes}")


def test_kept_connections_are_told_to_close(tmp_path: Path) -> None:
    with running(tmp_path, "--lb-grace-s", "2") as up, httpx2.Client(trust_env=False) as client:
        body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
        before = client.post(f"{up.url}/chat/completions", json=body)
        assert "connection" not in before.headers
        up.process.terminate()
        wait_for(lambda: not up.is_ready(), 1.0)
        after = client.post(f"{up.url}/chat/completions", json=body)
        assert (after.status_code, after.headers["connection"]) == (200, "close")


def test_an_answer_that_began_before_sigterm_ends_whole(tmp_path: Path) -> None:
    with running(tmp_path) as up, Load(up.port, short=0, streams=10) as load:
        load.stream_tokens = 60
        wait_for(lambda: load.outcomes["stream"] >= 10)
        time.sleep(0.5)
        load._stop = True
        up.process.terminate()
        load.stop()
        assert not load.bad, load.bad
        assert up.process.wait(30) == 0


def test_a_configuration_that_changes_under_load_fails_nothing(tmp_path: Path) -> None:
    """Deployments come and go, ranks turn round, ten times."""
    with running(tmp_path) as up, Load(up.port, short=6, streams=20) as load:
        wait_for(lambda: load.outcomes["stream"] > 10)
        url = httpx2.get(f"{up.api}/healthz", trust_env=False)
        assert url.status_code == 200
        for number in range(10):
            names = [("a",), ("b", "a"), ("b",), ("a", "b")][number % 4]
            file = tmp_path / "changed.yaml"
            strategy = ("overflow", "capacity_round_robin")[number % 2]
            up.write([gateway("chat", *names, strategy=strategy, default=True)])
            file.write_bytes(up.config.read_bytes())
            applied = up.cli("apply", "-f", str(file))
            assert applied.returncode == 0, applied.stderr
        load.stop()
        assert not load.bad, load.bad
        assert load.good > 100


def test_row_67_our_certificate_changes_every_second_under_load(tmp_path: Path) -> None:
    """Two authorities in turn, both trusted by the clients, as in an overlap; every handshake must verify."""
    authorities = [trustme.CA(), trustme.CA()]
    trust = ssl.create_default_context()
    for authority in authorities:
        authority.configure_trust(trust)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def put(number: int) -> None:
        leaf = authorities[number % 2].issue_cert("chat.test", f"n{number}.test")
        for path, pem in ((cert, leaf.cert_chain_pems[0]), (key, leaf.private_key_pem)):
            fresh = path.with_suffix(".new")
            pem.write_to_path(fresh)
            fresh.rename(path)
            time.sleep(0.1)  # for a while the two do not fit together

    put(0)
    with engine("--model", "m", "--prefill-tokens-per-s", "0", "--decode-base-s", "0") as url:
        documents = [deployment("a", url), gateway("chat", "a", default=True)]
        flags = ("--auth", "none", "--access-log", "off", "--tls", f"{cert},{key}")
        with Up(tmp_path, documents, *flags) as up, Load(up.tls_port, short=4, streams=2, tls=trust) as load:
            load.reconnects = True
            shown = set()
            for number in range(1, 11):
                put(number)
                time.sleep(0.8)
                shown.add(ssl.get_server_certificate(("127.0.0.1", up.tls_port)))
            load.stop()
            assert not load.bad, load.bad
            assert load.opened > 100
            assert len(shown) >= 8, len(shown)
            print(f"{load.opened} handshakes over 11 certificates, {load.outcomes}")


def test_what_has_not_ended_when_the_grace_is_over_ends_loudly(tmp_path: Path) -> None:
    """Also to HTTP/1.0, where the end of the connection is all that tells a whole answer from half of one."""
    with Wall() as wall:
        wall.hold()
        models = [{"name": name} for name in ("held", "silent")]
        documents = [deployment("a", f"http://127.0.0.1:{wall.port}/v1", models=models), gateway("chat", "a")]
        with Up(tmp_path, documents, "--auth", "none", "--grace-s", "1") as up, ExitStack() as stack:
            asks = {
                "stream": request("held", stream=True),
                "old stream": request("held", stream=True).replace(b"HTTP/1.1", b"HTTP/1.0", 1),
                "not begun": request("held"),
                "stream not begun": request("silent", stream=True),
            }
            clients = {name: stack.enter_context(Client(up.port)) for name in asks}
            for name, ask in asks.items():
                clients[name].send(ask)
            for name in ("stream", "old stream"):
                clients[name].read_until(b"tok")
            wait_for(lambda: len(wall.seen) == 4)
            up.process.terminate()
            for name, client in clients.items():
                if "not begun" in name:
                    answer = client.read()
                    assert (answer.status, answer.code) == (503, "shutting_down"), name
                    assert answer.headers["x-should-retry"] == "true" and "retry-after" in answer.headers
                    assert answer.headers["connection"] == "close"
                    continue
                rest = b""
                while data := client.socket.recv(1 << 16):
                    rest += data
                assert b'"code":"shutting_down"' in rest and b"[DONE]" not in rest, name
                assert not rest.endswith(b"0\r\n\r\n")
            assert up.process.wait(30) == 0
            rows = {row.outcome: row.billed_prompt_tokens for row in rows_of(up)}
            assert set(rows) == {"client_gone", "refused"} and rows["refused"] == 0 and rows["client_gone"] > 0


def test_who_waits_at_a_tls_door_with_something_else_does_not_end_the_worker() -> None:
    """The last worker takes who still waits to be accepted: among them may be a port scan, or one who is silent."""
    authority = trustme.CA()
    server, trust = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("door.test").configure_cert(server)
    authority.configure_trust(trust)
    made: list[asyncio.Protocol] = []

    class Guest(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            made.append(self)

    async def close() -> None:
        door = Listener(os.dup(listener.fileno()), server, Guest)
        begun_s = time.monotonic()
        await door.close(last=True)
        assert time.monotonic() - begun_s < 5

    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        address = listener.getsockname()
        scan, _ = (stack.enter_context(socket.create_connection(address)) for _ in range(2))
        scan.sendall(b"GET / HTTP/1.0\r\n\r\n")
        good = stack.enter_context(socket.create_connection(address))
        threading.Thread(target=lambda: trust.wrap_socket(good, server_hostname="door.test"), daemon=True).start()
        uvloop.run(close())
        assert len(made) == 1
