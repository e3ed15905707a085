"""The HTTP edge under fire: requests as the upstream gets them against requests as a second reader finds them.

What the upstream counts is the oracle: a request too many, or with another body, is one that was smuggled.
"""

import random
from pathlib import Path

from fleetgate.core.model import Deployment
from tests.fuzz import strict_http, strict_json
from tests.fuzz.cell import Cell, Wire
from tests.fuzz.mutation import Mutator
from tests.fuzz.strict_http import Item, Response
from tests.loopback.rig import deployment, gateway
from tests.loopback.test_edge_framing import BAD

BODY = b'{"model":"m","messages":[]}'
HOST = b"Host: chat.test\r\n"
CHAT = b"POST /v1/chat/completions HTTP/1.1\r\n"


def post(*lines: bytes, body: bytes = BODY) -> bytes:
    """A good request with a length."""
    return CHAT + HOST + b"".join(lines) + b"Content-Length: %d\r\n\r\n" % len(body) + body


def chunked(*chunks: bytes, trailers: bytes = b"") -> bytes:
    """A good request in chunks."""
    framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return CHAT + HOST + b"Transfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n" + trailers + b"\r\n"


EXAMPLES = [
    post(),
    post(b"Content-Type: application/json\r\nAuthorization: Bearer x\r\nX-Stainless-Retry-Count: 1\r\n"),
    post() * 3,
    chunked(BODY),
    chunked(BODY[:9], BODY[9:10], BODY[10:], trailers=b"x-a: b\r\n"),
    chunked(BODY) + post() + chunked(BODY),
    post() + b"GET /v1/models HTTP/1.1\r\n" + HOST + b"\r\n" + post(),
    b"HEAD /v1/models/m HTTP/1.1\r\n" + HOST + b"\r\nOPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n" + post(),
    b"POST /v1/completions HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 27\r\n\r\n" + BODY + post(),
    post(b"Expect: 100-continue\r\n") + post(),
    post(b"Connection: close\r\n") + post(),
    post(b"Connection: upgrade, http2-settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n")
    + post(),
    post(body=post(body=b"")) + post(),  # a request inside of a body
    post(body=b'{"model":"m","x":"' + post().replace(b"\r\n", b"\\r\\n").replace(b'"', b'\\"') + b'"}') + post(),
    b"\r\n\r\n" + post(b"X-A: \xc3\xa4\r\n") + b"\r\n" + post(b"x-fleetgate-timeout-ms: 5000\r\n"),
    b"DELETE /v1/chat/completions HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\n\r\nabc" + post(),
    post(body=b'{"model":"nobody"}') + post(body=b"{") + post(),
    post(b"Origin: http://chat.test\r\n") + post(b"Origin: http://evil.test\r\n") + post(),
]
TOKENS = [
    b"\r\n", b"\r", b"\n", b"\n\r\n", b"\r\n\r\n", b"\r\r\n", b" ", b"\t", b"\x00", b"\x0b", b"\x0c", b"\x7f",
    b"\x85", b"\xa0", b"\xff", b":", b";", b",", b"0", b"00", b"-1", b"+1", b"0x1b", b"1b", b"27", b"28", b"1e1",
    b"9" * 16, b"ffffffff", b"100000000", b"0\r\n\r\n", b"0\r\n", b"1b\r\n", b"1b;a=b\r\n", b"1b ;a\r\n", b"1b;\r\n",
    b";a=\"\r\n\"", b"Content-Length: 27\r\n", b"Content-Length: 0\r\n", b"Content-Length: +27\r\n",
    b"Content-Length: 27, 27\r\n", b"content-length:\t27\r\n", b"Content-Length : 27\r\n",
    b"Content-Length: 027 \r\n", b"Content\x00-Length: 1\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: identity\r\n", b"transfer-encoding:chunked\r\n", b"Transfer-Encoding: xchunked\r\n",
    b"Transfer-Encoding: chunked, identity\r\n", b"Transfer-Encoding:\x0bchunked\r\n",
    b"Transfer-Encoding : chunked\r\n", b"Transfer-Encoding:\r\n chunked\r\n", b" Transfer-Encoding: chunked\r\n",
    b"Transfer_Encoding: chunked\r\n", b"Transfer-Encoding: \"chunked\"\r\n", b"Trailer: Content-Length\r\n",
    b"Host: chat.test\r\n", b"Host: evil.test\r\n", b"Host:\r\n", b"Host: chat.test:80:80\r\n", b"Host: [::1]\r\n",
    b"Host: 127.0.0.1:80\r\n", b"Host: a@chat.test\r\n", b"Connection: close\r\n", b"Connection: keep-alive\r\n",
    b"Connection: content-length\r\n", b"Proxy-Connection: keep-alive\r\n", b"Keep-Alive: 1\r\n", b"TE: trailers\r\n",
    b"Expect: 100-continue\r\n", b"Expect: 200\r\n", b"Upgrade: websocket\r\n", b"X: y\r\n" * 63, b"X: y\r\n",
    b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", b" HTTP/2.0\r\n", b"HTTP/1.1", b"HTTP/1.10", b"GET", b"POST ",
    b"PRI * HTTP/2.0\r\n", b"http://chat.test", b"//", b"/../", b"%2e%2e", b"/v1/models", b"?", b"#", b"*", CHAT,
    HOST, BODY, post(), chunked(BODY),
]  # fmt: skip
ATTACKS = [attack for attack in BAD.values() if len(attack) < 2000]
MODELS = {"m": "m", "ok": "ok"}
ANSWER = b'{"id":"w","choices":[{"index":0,"message":{"content":"x"},"finish_reason":"stop"}]}'
GOOD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER)
# llhttp knows these methods; another word in capitals is no method to it, and refused before it is looked at.
METHODS = frozenset(
    b"GET HEAD POST PUT DELETE OPTIONS TRACE PATCH LINK UNLINK COPY LOCK MKCOL MOVE PROPFIND PROPPATCH SEARCH UNLOCK "
    b"BIND REBIND UNBIND ACL REPORT MKACTIVITY CHECKOUT MERGE NOTIFY SUBSCRIBE UNSUBSCRIBE PURGE MKCALENDAR QUERY "
    b"SOURCE".split()
)


def served(item: Item) -> bool:
    """Whether a request must reach the upstream."""
    if item.denied or item.method != b"POST":
        return False
    try:
        return strict_json.Reading(item.body).model in MODELS
    except strict_json.Refuse:
        return False


class Edge:
    """Mutated connections."""

    name = "edge"

    def __init__(self, data_dir: Path) -> None:
        self._cell = Cell(data_dir, self._answered)
        one: Deployment = deployment("one", 1, 1, models=MODELS)
        self._cell.use((one,), gateway("one", default=True))
        self._received: list[tuple[bytes, bytes]] = []
        self.forwarded = 0

    def make(self, rng: random.Random) -> bytes:
        """An input."""
        mutator = Mutator(rng, TOKENS)
        data = mutator.damage(rng.choice(EXAMPLES if rng.random() < 0.7 else ATTACKS))
        return data + mutator.damage(rng.choice(EXAMPLES)) if rng.random() < 0.4 else data

    def _answered(self, wire: Wire, port: int) -> None:
        """An upstream was sent something: one request, whole and plain."""
        sent = bytes(wire.written)
        wire.written.clear()
        end = sent.index(b"\r\n\r\n") + 4
        head = strict_http.read_head(sent[:end])
        assert strict_http.framing(head, http10=False) == (len(sent) - end, False), "our own framing is off"
        names = [name for name, _ in head.fields]
        assert len(set(names)) == len(names), f"a header twice: {names}"
        assert not {b"connection", b"te", b"trailer", b"upgrade", b"expect", b"keep-alive"}.intersection(names)
        self._received.append((head.first.split(b" ")[1], sent[end:]))
        self._cell.loop.call_soon(wire.feed, GOOD)

    def check(self, data: bytes, rng: random.Random) -> None:
        """What the upstream gets, and how many answers the client gets, is what the second reader says."""
        cell = self._cell
        self._received = []
        reading = strict_http.read_requests(data)
        client = cell.connect()
        for piece in Mutator(rng, TOKENS).cut(data):
            client.feed(piece)
            cell.loop.run()
        answers = _answers(bytes(client.written), reading.items)
        expected, stopped = _until_closed(reading.items, answers)
        wanted = [(item.path, item.body) for item in expected if served(item)]
        self.forwarded += len(wanted)
        assert self._received == wanted, f"the upstream got {self._received}, not {wanted}"
        refused = reading.end == "refused" and not stopped
        assert len(answers) == len(expected) + refused, f"{len(answers)} answers for {len(expected)} requests"
        for item, answer in zip(expected, answers, strict=False):
            _judge(item, answer)
        assert not refused or 400 <= answers[-1].status <= 431 or answers[-1].status == 505, answers[-1]
        over = client.closing or client.finished
        assert over == (reading.end != "open" or stopped), "the connection should have ended, or not"
        client.end()
        cell.loop.run()
        assert not cell.in_flight() and not cell.plane.registry.in_flight, "something was left behind"


def _until_closed(items: list[Item], answers: list[Response]) -> tuple[list[Item], bool]:
    """The requests up to where the gateway ended the connection of its own will, and whether it did.

    It may do so after a request that it denies by its head: the body may still be on its way then, and that depends on
    how the bytes were cut; or it has refused the head altogether, for llhttp does not know the method.
    """
    for position, (item, answer) in enumerate(zip(items, answers, strict=False)):
        chose = item.denied and (item.has_body or item.method not in METHODS) and not answer.keep_alive
        if chose or _ends(item):
            return items[: position + 1], True
    return items, False


def _answers(data: bytes, items: list[Item]) -> list[Response]:
    """All answers; each is whole."""
    at = 0
    answers: list[Response] = []
    while at < len(data):
        item = items[len(answers)] if len(answers) < len(items) else None
        bodiless = item is not None and item.method == b"HEAD"
        response = strict_http.read_response(data, at, False, bodiless)
        assert response is not None and response.whole, data[at:]
        at = response.after
        if response.status != 100:
            answers.append(response)
    return answers


def _judge(item: Item, answer: Response) -> None:
    """The right kind of answer for a request."""
    if served(item):
        assert (answer.status, answer.body) == (200, ANSWER), answer
    elif item.denied:
        assert answer.status in (204, 400, 403, 404, 405), answer
    elif item.method == b"POST":
        assert answer.status in (400, 404), answer
    else:
        assert answer.status in (200, 404), answer


def _ends(item: Item) -> bool:
    """Whether the connection ends with it: its head says so, or HTTP/1.0 would not find the end of its answer."""
    return item.closes or item.body_missing or (item.http10 and served(item) and strict_json.Reading(item.body).stream)
