"""Answers under fire: an upstream's bytes, damaged, and what a client then reads, judged by readers of our own.

Whatever an upstream sends, its client gets text in UTF-8, events of JSON, and either the end of an answer or an error
and a broken connection; nothing that was not sent, and nothing left out that was well.
"""

import json
import random
import re
from pathlib import Path
from typing import Any

import msgspec

from fleetgate.core.model import Gateway
from tests.fuzz import strict_http, strict_json
from tests.fuzz.cell import Cell, Wire, with_slot
from tests.fuzz.edge import post
from tests.fuzz.mutation import Mutator
from tests.fuzz.strict_http import Response
from tests.loopback.rig import deployment, gateway
from tests.loopback.wall_replies import DONE, EVENT_STREAM, answer, chunk, event, finish, role, tokens, usage_event

MODEL = "m"
LENGTHLESS = b"HTTP/1.1 200 OK\r\ndate: Mon, 01 Jan 2024 00:00:00 GMT\r\ncontent-type: text/event-stream\r\n\r\n"
CHUNKED = EVENT_STREAM + b"transfer-encoding: chunked\r\n\r\n"
PIECES = [role(MODEL), *tokens(MODEL, 7), finish(MODEL), usage_event(MODEL), DONE]
WHOLE = answer(MODEL)
COMMENT = b": keep-alive\n\n"
ERROR = b'data: {"error":{"message":"no","code":429}}\n\n'


def streamed(events: list[bytes], each: bool = True) -> bytes:
    """A stream in chunks, one for each event or one for all."""
    body = b"".join(chunk(one) for one in events) if each else chunk(b"".join(events))
    return CHUNKED + body + b"0\r\n\r\n"


def whole(body: bytes, first: bytes = b"HTTP/1.1 200 OK", extra: bytes = b"") -> bytes:
    """An answer that is not streamed."""
    length = b"content-length: %d\r\n\r\n" % len(body)
    return (
        first + b"\r\ndate: Mon, 01 Jan 2024 00:00:00 GMT\r\ncontent-type: application/json\r\n" + extra + length + body
    )


HALF = event(MODEL, {"content": "x"}).replace(b"x", b"\xf0\x9f")  # of a code point
IN_CHUNKS = b"transfer-encoding: chunked\r\n\r\n" + chunk(WHOLE) + b"0\r\n\r\n"


STREAMS = [
    streamed(PIECES),
    streamed(PIECES, each=False),
    streamed([one.replace(b"\n\n", b"\r\n\r\n") for one in PIECES]),
    streamed([one.replace(b"\n\n", b"\n\r\n") for one in PIECES]),
    streamed([COMMENT, PIECES[0], COMMENT, *PIECES[1:4], COMMENT, *PIECES[4:]]),
    streamed([b"event: x\nid: 1\n" + one for one in PIECES]),
    streamed([one.replace(b'":', b'": ').replace(b",", b", ") for one in PIECES]),
    streamed(PIECES[:5]),
    streamed([*PIECES[:3], ERROR, *PIECES[3:]]),
    streamed([*PIECES[:3], b"data: {not json}\n\n", *PIECES[3:]]),
    streamed([*PIECES[:3], b"data: \xff\xfe\n\n", HALF, *PIECES[3:]]),
    LENGTHLESS + b"".join(PIECES),
    b"HTTP/1.1 100 Continue\r\n\r\n" + streamed(PIECES),
    streamed(PIECES).replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"transfer-encoding: chunked", b"x: y"),
    streamed(PIECES).replace(b"0\r\n\r\n", b"0\r\nx-trailer: y\r\n\r\n"),
    whole(WHOLE),
    whole(b'{"error":{"message":"no"}}', b"HTTP/1.1 400 Bad Request"),
]
BODIES = [
    whole(WHOLE),
    whole(WHOLE, extra=b"set-cookie: a=b\r\nserver: x\r\nx-ratelimit-limit: 5\r\nopenai-model: q\r\n"),
    whole(WHOLE).partition(b"content-length")[0] + IN_CHUNKS,
    whole(WHOLE).replace(b"content-length", b"x-length"),
    whole(b'{"error":{"message":"no"}}', b"HTTP/1.1 400 Bad Request"),
    whole(b"{}", b"HTTP/1.1 429 Too Many Requests", b"retry-after: 7\r\n"),
    whole(b"", b"HTTP/1.1 302 Found", b"location: http://169.254.169.254/\r\n"),
    whole(b"", b"HTTP/1.1 101 Switching Protocols", b"connection: upgrade\r\nupgrade: h2c\r\n"),
    b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" * 3 + whole(WHOLE),
    whole(WHOLE) + whole(answer("smuggled")),
]
TOKENS = [
    b"\n", b"\r", b"\r\n", b"\n\n", b"\r\r", b"\n\r\n", b"\r\n\r\n", b"\n\r", b"data: ", b"data:", b"data", b": c\n",
    b"event: error\n", b"event: x\n", b"id: 1\n", b"retry: 1\n", b"data: [DONE]\n\n", b"data: [DONE]\r\r", b"[DONE]",
    b"data: {}\n\n", b"data: []\n\n", b"data: null\n\n", b"data: 1\n\n", b"data: {\n\n", b"data: \n\n",
    b"\xef\xbb\xbf", b"\xff", b"\x80", b"\xc3", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\x00", b"{",
    b"}", b"[", b"]", b",", b'"', b"\\", b"\\u", b"\\ud800", b":", b"null", b'"finish_reason":null',
    b'"finish_reason":"stop"', b'"finish_reason":"error"', b'"error":{"message":"x"},', b'"choices":[],',
    b'"choices":[1],', b'"choices":{},', b'"usage":{},', b'"usage":{"prompt_tokens":1e99},', b'"index":1,',
    b'"index":-1,', b'"model":"q",', b'"content":1,', b'"tool_calls":[{"index":0,"function":{"arguments":"{"}}],',
    b'"id":7,', b'"type":"x",', b'"text":5,', b"[" * 1500, b'{"a":' * 1200, b"9" * 5000, b"1e999", b"NaN", ERROR,
    COMMENT, DONE, PIECES[3], finish(MODEL), b"0\r\n\r\n", b"0\r\n", b"5\r\n", b"fffffff\r\n", b"-1\r\n", b"+5\r\n",
    b"0x5\r\n", b";a=b\r\n", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 x\r\n\r\n",
    b"101", b"204", b"304", b"302", b"429", b"500", b"503", b"404", b"content-length: 5\r\n",
    b"content-length: +5\r\n", b"transfer-encoding: chunked\r\n", b"transfer-encoding: gzip\r\n",
    b"connection: close\r\n", b"connection: upgrade\r\nupgrade: h2c\r\n", b"content-encoding: gzip\r\n",
    b"set-cookie: a=b\r\n", b"content-type: text/html\r\n", b"content-type: text/event-stream\r\n", b"x: \r\n y\r\n",
    b"location: http://x/\r\n", b"HTTP/2 200", b"retry-after: 99999999999\r\n", b"retry-after-ms: -1\r\n",
]  # fmt: skip
# What clients may be told of. FAULTS.md row 27.
TOLD = frozenset(
    b"date content-type content-length transfer-encoding connection x-request-id x-fleetgate-deployment retry-after "
    b"x-fleetgate-region x-fleetgate-attempts retry-after-ms x-should-retry openai-processing-ms openai-version "
    b"openai-model".split()
)
FAST_MARK = b'"finish_reason":null'


def split_events(payload: bytes) -> tuple[list[tuple[bytes, bytes | None]], bytes]:
    """The events of a stream with their data, line by line as the WHATWG writes; and what is left of an unfinished one.

    Shape: the data is None for an event that has none.
    """
    events: list[tuple[bytes, bytes | None]] = []
    data: list[bytes] = []
    begin = at = 0
    while at < len(payload):
        ends = [found for found in (payload.find(b"\n", at), payload.find(b"\r", at)) if found >= 0]
        if not ends:
            break
        line, end = payload[at : min(ends)], min(ends) + 1
        if payload[end - 1 : end + 1] == b"\r\n":
            end += 1
        if not line:
            events.append((payload[begin:end], b"\n".join(data) if data else None))
            data, begin = [], end
        elif line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
        elif line == b"data":
            data.append(b"")
        at = end
    return events, payload[begin:]


class ClientOptions(msgspec.Struct):
    """What a client asks for."""

    stream: bool
    greedy: bool
    http10: bool
    engine: str

    @property
    def request(self) -> bytes:
        """Its bytes."""
        ask: dict[str, object] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
        if self.stream:
            ask["stream"] = True
        if self.greedy:
            ask["temperature"] = 0
        data = post(body=json.dumps(ask).encode())
        return data.replace(b" HTTP/1.1", b" HTTP/1.0") if self.http10 else data


class Streams:
    """Damaged answers, in front of a second Deployment that answers well."""

    name = "streams"

    def __init__(self, data_dir: Path) -> None:
        self._cell = Cell(data_dir, self._asked)
        self._uses = 0
        self._first: Wire | None = None
        self._later = 0
        self._options = ClientOptions(True, False, False, "openai")
        self.ends: dict[str, int] = {}

    def make(self, rng: random.Random) -> bytes:
        """An input."""
        return Mutator(rng, TOKENS).damage(rng.choice(STREAMS if rng.random() < 0.75 else BODIES))

    def check(self, data: bytes, rng: random.Random) -> None:
        """Feed an answer and judge what the client reads."""
        self._options = options = ClientOptions(
            rng.random() < 0.8, rng.random() < 0.3, rng.random() < 0.1, rng.choice(("openai", "vllm"))
        )
        self._prepare(options)
        client = self._cell.connect()
        client.feed(options.request)
        self._cell.loop.run()
        first = self._first
        assert first is not None
        for piece in Mutator(rng, TOKENS).cut(data):
            first.feed(piece)
            self._cell.loop.run()
        reused = first in self._cell.kept()
        first.end(rng.choice((None, None, ConnectionResetError())))
        self._cell.loop.run()
        self._judge(data, client, options, reused)
        client.end()
        self._cell.loop.run()
        assert not self._cell.in_flight() and not self._cell.plane.registry.in_flight, "something was left behind"

    def _prepare(self, options: ClientOptions) -> None:
        """Deployments of which nothing is known."""
        self._uses = self._uses % 500 + 1
        one = deployment("one", 1, 2 * self._uses, engine=options.engine)
        two = deployment("two", 2, 2 * self._uses + 1, engine=options.engine)
        site: Gateway = gateway("one", "two", default=True)
        self._cell.use((with_slot(one, one.slot), with_slot(two, two.slot)), site)
        self._first, self._later = None, 0

    def _asked(self, wire: Wire, port: int) -> None:
        """The first attempt is the fuzzer's to answer; all later ones are answered well."""
        wire.written.clear()
        if self._first is None:
            self._first = wire
            return
        self._later += 1
        good = STREAMS[0] if self._options.stream else BODIES[0]
        self._cell.loop.call_soon(wire.feed, good)

    # --- what the client reads ---

    def _judge(self, data: bytes, client: Wire, options: ClientOptions, reused: bool) -> None:
        written = bytes(client.written)
        response = strict_http.read_response(written, 0, client.closing)
        assert response is not None, "no answer"
        assert response.after == len(written), "more than one answer"
        names = [name for name, _ in response.head.fields]
        assert len(set(names)) == len(names) and TOLD.issuperset(names), names
        if reused:
            sent = strict_http.read_response(_final(data), 0, False)
            assert sent is not None and sent.whole and sent.keep_alive, "kept a connection that cannot be trusted"
            assert sent.after == len(_final(data)), "kept a connection with bytes behind the answer"
        is_stream = response.head.joined(b"content-type").startswith(b"text/event-stream")
        if is_stream and response.status == 200:
            end = self._judge_stream(data, response, client, options)
        else:
            end = self._judge_whole(response, client)
        self.ends[end] = self.ends.get(end, 0) + 1

    def _judge_whole(self, response: Response, client: Wire) -> str:
        if not response.whole:
            assert client.closing
            return "whole, cut"
        assert response.status != 500
        if response.status == 200:
            assert isinstance(strict_json.decode(response.body), strict_json.Members), response.body
        return f"{response.status}"

    def _judge_stream(self, data: bytes, response: Response, client: Wire, options: ClientOptions) -> str:
        response.body.decode()  # valid UTF-8, however it ends
        events, rest = split_events(response.body)
        assert not rest, f"an event without end: {rest[-200:]!r}"
        told = [part.rstrip(b" \t") for _, part in events if part is not None]
        for raw, part in events:
            if part is not None and part.rstrip(b" \t") != b"[DONE]":
                self._judge_event(raw, part)
        if response.whole and (not options.http10 or told[-1] == b"[DONE]"):
            assert told and told[-1] == b"[DONE]", "a clean end without [DONE]"
            assert told.count(b"[DONE]") == 1 and any(map(_finishes, told)), "a clean end of an unfinished answer"
            end = "whole stream"
        else:
            assert client.closing, "neither an end nor a broken connection"
            assert b"[DONE]" not in told, told[-2:]
            if options.stream:  # without a stream the body itself is broken
                assert b"upstream_interrupted" in told[-1], told[-2:]
                assert strict_json.decode(told.pop())
            end = "interrupted"
        if not self._later:
            self._compare(data, told, end)
        return end + (", moved" if self._later else "")

    def _judge_event(self, raw: bytes, part: bytes) -> None:
        try:
            strict_json.decode(part)
        except strict_json.Refuse:
            raise AssertionError(f"an event that is not JSON: {raw!r}") from None

    def _compare(self, data: bytes, told: list[bytes], end: str) -> None:
        """Nothing was made up and, where it ended well, nothing that was well is missing."""
        sent = strict_http.read_response(_final(data), 0, True, bodiless=True)
        assert sent is not None and sent.status == 200, "content out of an answer that cannot be read"
        events, _ = split_events(strict_http.payload_until_bad(_final(data)))
        texts = [part.decode(errors="replace").encode() for _, part in events if part is not None]
        offered = [_renamed(text.rstrip(b" \t")) for text in texts]
        position = 0
        for part in map(_renamed, told):
            while position < len(offered) and offered[position] != part:
                position += 1
            if position == len(offered) and part == told[-1] == b"[DONE]":
                break  # ours: the upstream forgot it
            assert position < len(offered), f"an event that was not sent: {part!r}"
            position += 1
        if end == "whole stream":
            till = offered.index(b"[DONE]") if b"[DONE]" in offered else len(offered)
            well = [part for _, part in events if part is not None][:till]
            rest = iter(told)
            assert all(part in rest for part in well if part in PRISTINE), "an event that was well is missing"


PRISTINE = frozenset(one[6:-2] for one in PIECES if b"usage" not in one and b"[DONE]" not in one)


_NAME = re.compile(rb'"model": *"(?:[^"\\]|\\.)*"')


def _renamed(part: bytes) -> bytes:
    """With the name that was asked for, as clients read it."""
    return _NAME.sub(b'"model":"m"', part)


def _final(data: bytes) -> bytes:
    """Without interim answers."""
    at = 0
    while (response := strict_http.read_response(data, at, True, bodiless=True)) is not None and response.status < 200:
        at = response.after
    return data[at:]


def _finishes(part: bytes) -> bool:
    try:
        choices: Any = json.loads(part)["choices"]
        return any(choice.get("finish_reason") for choice in choices)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
