"""TLS towards Endpoints: bad certificates move a request on, a change of authority breaks nothing. Rows 3 and 67."""

import asyncio
import datetime
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trustme

from tests.faults.life_load import Load
from tests.loopback.engines import engine
from tests.loopback.up_rig import Up, deployment, gateway
from tests.waiting import wait_for

ANSWER = (
    b'{"id":"c","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":{"role":"assistant",'
    b'"content":"Hi"},"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}'
)
REPLY = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
YESTERDAY = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)


class Secure:
    """An engine behind TLS that takes one request a connection, so that every request is a handshake."""

    def __init__(self, leaf: trustme.LeafCert) -> None:
        self.handshakes = 0
        self.failed = 0
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        leaf.configure_cert(self._context)
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(
            asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context, backlog=256)
        )
        self._loop.set_exception_handler(lambda loop, context: None)
        self.url = f"https://localhost:{self._server.sockets[0].getsockname()[1]}/v1"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def show(self, leaf: trustme.LeafCert) -> None:
        """Another certificate from the next handshake on."""
        self._loop.call_soon_threadsafe(leaf.configure_cert, self._context)

    @contextmanager
    def running(self) -> Iterator["Secure"]:
        self._thread.start()
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.handshakes += 1
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
            await reader.readexactly(length)
            writer.write(REPLY % (len(ANSWER), ANSWER))
            await writer.drain()
        except (EOFError, OSError):
            self.failed += 1
        writer.close()


def believe(path: Path, *authorities: trustme.CA) -> None:
    """Write who is believed, as an operator's rename does."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(b"".join(authority.cert_pem.bytes() for authority in authorities))
    fresh.rename(path)


def test_row_67_an_upstream_changes_its_authority_under_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = trustme.CA(), trustme.CA()
    bundle = tmp_path / "believed.pem"
    believe(bundle, old)
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    with Secure(old.issue_cert("localhost")).running() as secure:
        documents = [deployment("a", secure.url, engine="openai"), gateway("chat", "a", default=True)]
        with Up(tmp_path, documents, "--auth", "none", "--access-log", "off") as up:
            with Load(up.port, short=4, streams=0) as load:
                wait_for(lambda: load.good > 20)
                for _ in range(3):  # certificates come and go under one authority
                    secure.show(old.issue_cert("localhost"))
                    time.sleep(0.3)
                whole = bundle.read_bytes()
                bundle.write_bytes(whole[: len(whole) // 2])  # somebody writes in place, and is not done
                time.sleep(0.3)
                believe(bundle, old, new)
                time.sleep(0.5)
                secure.show(new.issue_cert("localhost"))
                time.sleep(0.5)
                believe(bundle, new)
                time.sleep(0.5)
                good = load.good
                wait_for(lambda: load.good > good + 20)
                load.stop()
                assert not load.bad, load.bad
            assert secure.handshakes > 100
            secure.show(old.issue_cert("localhost"))  # who is believed no more is refused
            wait_for(lambda: up.ask().status_code == 502)


@pytest.mark.parametrize("fault", ["expired", "wrong name", "untrusted", "stalled"])
def test_row_03_a_bad_certificate_moves_the_request_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    good, stranger = trustme.CA(), trustme.CA()
    leaf = {
        "expired": good.issue_cert("localhost", not_after=YESTERDAY, not_before=YESTERDAY - datetime.timedelta(days=9)),
        "wrong name": good.issue_cert("elsewhere.test"),
        "untrusted": stranger.issue_cert("localhost"),
        "stalled": good.issue_cert("localhost"),
    }[fault]
    bundle = tmp_path / "believed.pem"
    believe(bundle, good)
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    with (
        Secure(leaf).running() as secure,
        socket.create_server(("127.0.0.1", 0), backlog=256) as silent,
        engine("--model", "m", "--prefill-tokens-per-s", "0", "--decode-base-s", "0") as url,
    ):
        bad_url = f"https://localhost:{silent.getsockname()[1]}/v1" if fault == "stalled" else secure.url
        documents = [
            deployment("bad", bad_url, engine="openai"),
            deployment("good", url),
            gateway("both", "bad", "good", default=True),
            gateway("alone", "bad"),
        ]
        with Up(tmp_path, documents, "--auth", "none", "--access-log", "off") as up:
            for _ in range(10):
                begun_s = time.monotonic()
                answer = up.ask()
                assert answer.status_code == 200, answer.text
                assert answer.headers["x-fleetgate-deployment"] == "good"
                assert time.monotonic() - begun_s < 5.0  # two seconds for the handshake, and what a busy machine adds
            if fault == "stalled":
                return
            alone = {"host": "alone.test"}
            wait_for(lambda: asked(up, alone)[0] == 502)
            status, code, retry = asked(up, alone, until=502)
            assert (status, code, retry) == (502, "upstream_tls_error", "false")
        assert secure.failed == secure.handshakes == 0  # nothing was ever sent over it


def asked(up: Up, headers: dict[str, str], until: int = 0) -> tuple[int, str, str]:
    """Status, code and `x-should-retry` of an answer; ejected Endpoints are tried again every few seconds."""
    import httpx2

    deadline_s = time.monotonic() + 30
    while True:
        body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
        answer = httpx2.post(f"{up.url}/chat/completions", json=body, headers=headers, timeout=30, trust_env=False)
        if not until or answer.status_code == until or time.monotonic() > deadline_s:
            code = answer.json().get("error", {}).get("code", "")
            return answer.status_code, code, answer.headers.get("x-should-retry", "")
        time.sleep(0.05)
