"""A client on a raw socket that hides nothing: what came, in which order, and how it ended."""

import json
import socket
import struct
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import msgspec

TIMEOUT_S = 30.0
PATH = "/v1/chat/completions"


class Answer(msgspec.Struct):
    """One response. Shape: `body` without framing; `whole` says that it ended as its framing promised."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool

    @property
    def code(self) -> str:
        """The error's code."""
        return str(self.json()["error"]["code"])

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


def request(model: str = "m", stream: bool = False, headers: Iterable[str] = (), **fields: object) -> bytes:
    """A whole chat request; `fields` are further keys of its body."""
    body: dict[str, object] = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
    if stream:
        body["stream"] = True
    return post(json.dumps({**body, **fields}).encode(), headers)


def post(body: bytes, headers: Iterable[str] = (), path: str = PATH, host: str = "chat.test") -> bytes:
    """A POST with this body."""
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


class Client:
    """One connection."""

    def __init__(self, port: int, receive_bytes: int = 0) -> None:
        self.socket = socket.socket()
        if receive_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.settimeout(TIMEOUT_S)
        self.socket.connect(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""
        self.ended = False

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send; a peer that has closed already is no error here, for its answer may still be read."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def ask(self, data: bytes) -> Answer:
        """Send a request and read its answer."""
        self.send(data)
        return self.read()

    def reset(self) -> None:
        """Leave by RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    @property
    def buffered(self) -> int:
        """How many bytes came that no answer has used."""
        return len(self._buffer)

    def receive(self) -> bool:
        """Read more; False at the end."""
        try:
            data = self.socket.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        self._buffer += data
        self.ended = not data
        return not self.ended

    def read_until(self, mark: bytes) -> bytes:
        """Everything up to and with a mark, which must come."""
        while mark not in self._buffer:
            assert self.receive(), f"{mark!r} did not come, but {self._buffer[-500:]!r}"
        head, _, self._buffer = self._buffer.partition(mark)
        return head + mark

    def read(self, head_only: bool = False) -> Answer:
        """One response, 100 Continue left out."""
        head = self.read_until(b"\r\n\r\n")
        while head.startswith(b"HTTP/1.1 100"):
            head = self.read_until(b"\r\n\r\n")
        first, *rows = head.decode("latin-1").strip().split("\r\n")
        names = [row.partition(": ")[0] for row in rows]
        assert len(set(names)) == len(names), f"a header twice: {names}"
        headers = {name: value for name, _, value in (row.partition(": ") for row in rows)}
        answer = Answer(int(first.split()[1]), headers, b"", True)
        if head_only or answer.status == 204:
            return answer
        if "content-length" in headers:
            assert "transfer-encoding" not in headers
            answer.body, answer.whole = self._exactly(int(headers["content-length"]))
        elif headers.get("transfer-encoding") == "chunked":
            answer.body, answer.whole = self._chunks()
        else:
            while self.receive():
                pass
            answer.body, self._buffer = self._buffer, b""
        return answer

    def _exactly(self, length: int) -> tuple[bytes, bool]:
        while len(self._buffer) < length:
            if not self.receive():
                break
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        return body, len(body) == length

    def _chunks(self) -> tuple[bytes, bool]:
        parts: list[bytes] = []
        while True:
            while b"\r\n" not in self._buffer:
                if not self.receive():
                    return b"".join(parts), False
            line, _, self._buffer = self._buffer.partition(b"\r\n")
            size = int(line, 16)
            part, whole = self._exactly(size + 2)
            if not whole:
                return b"".join([*parts, part]), False
            assert part.endswith(b"\r\n")
            if not size:
                return b"".join(parts), True
            parts.append(part[:-2])

    def closed(self, within_s: float = TIMEOUT_S) -> bool:
        """Whether the other side ends the connection with nothing more said."""
        self.socket.settimeout(within_s)
        try:
            while self.receive():
                pass
        except TimeoutError:
            return False
        finally:
            self.socket.settimeout(TIMEOUT_S)
        return not self._buffer

    def glance(self, for_s: float = 0.0) -> None:
        """Read once what has come, or comes within a moment."""
        self.socket.settimeout(for_s)
        try:
            self.receive()
        except (TimeoutError, BlockingIOError):
            pass
        finally:
            self.socket.settimeout(TIMEOUT_S)


def ask(port: int, data: bytes) -> Answer:
    """One request on a connection of its own."""
    with Client(port) as client:
        return client.ask(data)
