"""What the wall does for each model name, whole or streamed as the request asks."""

import asyncio
import json
from collections.abc import Iterable

from tests.loopback.wall import Line, Reply, Seen

DATE = b"date: Mon, 01 Jan 2024 00:00:00 GMT\r\n"
DONE = b"data: [DONE]\n\n"
LAST = b"0\r\n\r\n"
EVENT_STREAM = b"HTTP/1.1 200 OK\r\n" + DATE + b"content-type: text/event-stream; charset=utf-8\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n\r\n"

# --- bodies and events, which tests compare with ----------------------------------------------------------------------


def answer(model: str, text: str = "Good day.") -> bytes:
    """A whole chat completion."""
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    body = {"id": "w", "object": "chat.completion", "created": 1, "model": model, "choices": [choice], "usage": usage}
    return json.dumps(body, separators=(",", ":")).encode()


def event(model: str, delta: dict[str, object], finish: str | None = None) -> bytes:
    """One chat chunk as an event, in compact JSON as engines write it."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    chunk = {"id": "w", "object": "chat.completion.chunk", "created": 1, "model": model, "choices": [choice]}
    return b"data: " + json.dumps(chunk, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def usage_event(model: str) -> bytes:
    """The event that tells nothing but usage."""
    usage = {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
    chunk = {"id": "w", "object": "chat.completion.chunk", "created": 1, "model": model, "choices": [], "usage": usage}
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def role(model: str) -> bytes:
    """The first event, without content."""
    return event(model, {"role": "assistant", "content": ""})


def tokens(model: str, count: int) -> list[bytes]:
    """Content events; some have text that looks like the end of something."""
    texts = ["tok ", "é→😀 ", 'quote " here ', "line\nbreak\r ", '"finish_reason":null ', "data: x\n\n ", "\\u0041 "]
    return [event(model, {"content": f"{index} {texts[index % len(texts)]}"}) for index in range(count)]


def finish(model: str) -> bytes:
    """The event with the finish_reason."""
    return event(model, {}, "stop")


def stream_of(model: str, count: int = 4, usage: bool = False) -> list[bytes]:
    """A whole good stream."""
    return [role(model), *tokens(model, count), finish(model), *([usage_event(model)] if usage else []), DONE]


def chunk(payload: bytes) -> bytes:
    """One HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


# --- building blocks --------------------------------------------------------------------------------------------------


def _events(seen: Seen) -> list[bytes]:
    usage = bool((seen.ask.get("stream_options") or {}).get("include_usage"))
    return stream_of(seen.model, seen.option("count", 4), usage)


def _head(length: int, status: bytes = b"200 OK", extra: bytes = b"") -> bytes:
    kind = b"content-type: application/json\r\n"
    return b"HTTP/1.1 " + status + b"\r\n" + DATE + kind + extra + b"content-length: %d\r\n\r\n" % length


async def _send_events(line: Line, seen: Seen, events: Iterable[bytes], last: bytes = LAST) -> None:
    """Each event in a chunk and a write of its own, `pace_s` apart: then each is likely to be read alone."""
    line.write(EVENT_STREAM + CHUNKED)
    pace_s = seen.option("pace_s", 0)
    for one in events:
        line.write(chunk(one))
        await asyncio.sleep(pace_s)
        await line.drain()
    if last:
        line.end()
        line.write(last)


async def _send_in_pieces(line: Line, data: bytes) -> None:
    """Cut at random places, one byte at a time at the worst."""
    at = 0
    while at < len(data):
        size = line.wall.random.choice((1, 1, 2, 3, 7, 20, 90))
        if at + size >= len(data):
            line.end()
        line.write(data[at : at + size])
        at += size
        await asyncio.sleep(0)


def _status(status: bytes, extra: bytes = b"", body: bytes = b'{"error":{"message":"upstream says no"}}') -> Reply:
    async def reply(line: Line, seen: Seen) -> None:
        line.end()
        line.write(_head(len(body), status, extra) + body)

    return reply


def raw(data: bytes, then: str = "") -> Reply:
    """Bytes as they are, then perhaps an end of the connection."""

    async def reply(line: Line, seen: Seen) -> None:
        line.write(data)
        await line.flush()
        if then:
            getattr(line, then)()

    return reply


def _whole(make: Reply, streamed: Reply) -> Reply:
    async def reply(line: Line, seen: Seen) -> None:
        await (streamed if seen.ask.get("stream") else make)(line, seen)

    return reply


# --- answers that are not streamed ------------------------------------------------------------------------------------


async def whole(line: Line, seen: Seen) -> None:
    """Content-Length, head and body in one write; `size` makes it large."""
    size = seen.option("size", 0)
    body = answer(seen.model, "x" * size) if size else answer(seen.model)
    line.end()
    line.write(_head(len(body)) + body)
    await line.drain()


async def whole_chunked(line: Line, seen: Seen) -> None:
    """In chunks of random sizes, cut at random places."""
    body = answer(seen.model)
    cut = line.wall.random.randint(1, len(body) - 1)
    framed = chunk(body[:cut]) + chunk(body[cut:]) + LAST
    await _send_in_pieces(line, _head(0).replace(b"content-length: 0\r\n", b"transfer-encoding: chunked\r\n") + framed)


async def odd_chunks(line: Line, seen: Seen) -> None:
    """Upper-case sizes, leading zeros, extensions and trailers: all legal."""
    body = answer(seen.model)
    line.end()
    line.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: Chunked\r\n\r\n")
    line.write(b'00%X;name=value;other="x"\r\n%b\r\n0\r\nx-trailer: 1\r\n\r\n' % (len(body), body))


async def until_close(line: Line, seen: Seen) -> None:
    """Neither length nor chunks: the end of the connection ends the body."""
    line.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n" + answer(seen.model))
    line.close()


async def old_http(line: Line, seen: Seen) -> None:
    """HTTP/1.0."""
    line.write(b"HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n" + answer(seen.model))
    line.close()


async def informed_first(line: Line, seen: Seen) -> None:
    """Interim responses before the real one; `count` of them."""
    line.write(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" * seen.option("count", 1))
    await whole(line, seen)


async def extra_bytes(line: Line, seen: Seen) -> None:
    """A second answer that nobody asked for, behind the first."""
    body = answer(seen.model)
    line.end()
    line.write((_head(len(body)) + body) * 2)


async def evil_headers(line: Line, seen: Seen) -> None:
    """Headers that no client may see, and hop-by-hop ones."""
    extra = (
        b"set-cookie: a=b\r\nserver: secret/1.0\r\nx-powered-by: php\r\nx-ratelimit-limit: 5\r\n"
        b"keep-alive: timeout=5\r\nconnection: x-foo\r\nlocation: http://evil.test/\r\n"
        b"x-request-id: theirs\r\nx-fleetgate-deployment: theirs\r\n"
        b"x-foo: bar\r\nwww-authenticate: Bearer\r\naccess-control-allow-origin: *\r\nopenai-processing-ms: 12\r\n"
    )
    body = answer(seen.model)
    line.end()
    line.write(_head(len(body), extra=extra) + body)


async def truncated_json(line: Line, seen: Seen) -> None:
    """Framing is right, the JSON is not whole."""
    body = answer(seen.model)[:-5]
    line.end()
    line.write(_head(len(body)) + body)


async def long_length(line: Line, seen: Seen) -> None:
    """Says more than it sends, then closes."""
    body = answer(seen.model)
    line.write(_head(len(body) + 20) + body)
    line.close()


async def short_length(line: Line, seen: Seen) -> None:
    """Says less than it sends."""
    body = answer(seen.model)
    line.end()
    line.write(_head(len(body) - 20) + body)


async def half_then_reset(line: Line, seen: Seen) -> None:
    """RST in the middle of the body (streamed: after `count` events)."""
    if seen.ask.get("stream"):
        await _send_events(line, seen, [role(seen.model), *tokens(seen.model, seen.option("count", 2))], last=b"")
    else:
        line.write(_head(1000) + b'{"half":')
    await line.flush()
    await asyncio.sleep(0.02)  # so that what was sent is read before the reset discards it
    line.reset()


async def half_then_fin(line: Line, seen: Seen) -> None:
    """A regular close in the middle of the body."""
    if seen.ask.get("stream"):
        await _send_events(line, seen, [role(seen.model), *tokens(seen.model, seen.option("count", 2))], last=b"")
    else:
        line.write(_head(1000) + b'{"half":')
    line.close()


async def stale(line: Line, seen: Seen) -> None:
    """Answers the first request of a connection and resets at the second, as an engine that was about to close it."""
    if [one.connection for one in line.wall.seen].count(line.number) > 1:
        line.reset()
    else:
        await whole_or_stream(line, seen)


async def silent(line: Line, seen: Seen) -> None:
    """Never answers."""
    await line.gone.wait()


async def held(line: Line, seen: Seen) -> None:
    """Waits for the gate before it answers; streamed: after the first content event."""
    if seen.ask.get("stream"):
        line.write(EVENT_STREAM + CHUNKED + chunk(role(seen.model)) + chunk(tokens(seen.model, 1)[0]))
        await line.wall.gate.wait()
        line.end()
        line.write(b"".join(map(chunk, stream_of(seen.model)[2:])) + LAST)
        return
    await line.wall.gate.wait()
    await whole(line, seen)


async def held_early(line: Line, seen: Seen) -> None:
    """Waits for the gate after the role event, before any content."""
    line.write(EVENT_STREAM + CHUNKED + chunk(role(seen.model)))
    await line.wall.gate.wait()
    line.end()
    line.write(b"".join(map(chunk, stream_of(seen.model)[1:])) + LAST)


async def slow(line: Line, seen: Seen) -> None:
    """Takes `delay_s`, then answers well."""
    await asyncio.sleep(seen.option("delay_s", 0.02))
    await whole_or_stream(line, seen)


# --- streams ----------------------------------------------------------------------------------------------------------


async def stream(line: Line, seen: Seen) -> None:
    """One event a chunk and a write."""
    await _send_events(line, seen, _events(seen))


whole_or_stream = _whole(whole, stream)
DATED = "-2026-11-01"  # what an engine may add to the name it was asked for


async def dated(line: Line, seen: Seen) -> None:
    """A good answer of an engine that calls the model by another name than it was asked for."""
    if seen.ask.get("stream"):
        await _send_events(line, seen, stream_of(seen.model + DATED))
        return
    body = answer(seen.model + DATED)
    line.end()
    line.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)


async def stream_at_once(line: Line, seen: Seen) -> None:
    """Head and all events in one write, each in its chunk."""
    line.end()
    line.write(EVENT_STREAM + CHUNKED + b"".join(map(chunk, _events(seen))) + LAST)


async def stream_one_chunk(line: Line, seen: Seen) -> None:
    """All events in one chunk."""
    line.end()
    line.write(EVENT_STREAM + CHUNKED + chunk(b"".join(_events(seen))) + LAST)


async def stream_in_pieces(line: Line, seen: Seen) -> None:
    """Every byte may come alone."""
    await _send_in_pieces(line, EVENT_STREAM + CHUNKED + b"".join(map(chunk, _events(seen))) + LAST)


async def stream_odd_chunks(line: Line, seen: Seen) -> None:
    """Chunks that begin and end inside events."""
    payload = b"".join(_events(seen))
    cuts = sorted(line.wall.random.sample(range(1, len(payload)), 12))
    parts = [payload[a:b] for a, b in zip([0, *cuts], [*cuts, len(payload)], strict=True)]
    line.end()
    line.write(EVENT_STREAM + CHUNKED + b"".join(map(chunk, parts)) + LAST)


async def stream_crlf(line: Line, seen: Seen) -> None:
    """Events that end in CR LF CR LF."""
    await _send_events(line, seen, (one.replace(b"\n\n", b"\r\n\r\n") for one in _events(seen)))


async def stream_comments(line: Line, seen: Seen) -> None:
    """Keep-alive comments between events, and an event with several fields."""
    named = b"event: message\nid: 7\n" + tokens(seen.model, 1)[0]
    model = seen.model
    await _send_events(line, seen, [role(model), named, b": keep-alive\n\n", *tokens(model, 2), finish(model), DONE])


async def stream_until_close(line: Line, seen: Seen) -> None:
    """No chunks: the end of the connection ends the stream."""
    line.write(EVENT_STREAM + b"\r\n" + b"".join(_events(seen)))
    line.close()


async def stream_with_length(line: Line, seen: Seen) -> None:
    """A stream whose length is known."""
    payload = b"".join(_events(seen))
    line.end()
    line.write(EVENT_STREAM + b"content-length: %d\r\n\r\n" % len(payload) + payload)


async def stream_late_end(line: Line, seen: Seen) -> None:
    """The terminating chunk comes a moment after [DONE]."""
    await _send_events(line, seen, _events(seen), last=b"")
    await asyncio.sleep(0.02)
    line.end()
    line.write(LAST)


def _stream_of(*parts: str, last: bytes = LAST, then: str = "") -> Reply:
    """A stream put together from named parts."""

    async def reply(line: Line, seen: Seen) -> None:
        model = seen.model
        named = {
            "role": role(model),
            "token": tokens(model, 1)[0],
            "finish": finish(model),
            "usage": usage_event(model),
            "done": DONE,
            "error": b'data: {"error":{"message":"engine fell over","code":500}}\n\n',
            "full": b'data: {"error":{"message":"slow down","code":429}}\n\n',
            "malformed": b'data: {"choices":[{"index":0,"delta":\n\n',
            "torn": tokens(model, 1)[0][:-8] + b"\n\n",
            "torn-marked": b'data: {"choices":[{"index":0,"finish_reason":null,"delta":{"content":"a\n\n',
            "damaged": tokens(model, 1)[0].replace(b'"delta":', b'"delta";'),
            "two-lines": tokens(model, 1)[0].replace(b'"delta":', b'\n"delta":'),
            "unquoted": tokens(model, 1)[0].replace(b'0 tok "', b"0 tok "),
            "not-utf8": tokens(model, 1)[0].replace(b"tok", b"\xff\xfe").replace(b"null", b"null "),
            "huge": event(model, {"content": "y" * (1200 * 1024)}),
            "endless": b"data: " + b"y" * (1200 * 1024),
            "comment": b": waiting\n\n",
            "partial": tokens(model, 1)[0][:30],
        }
        await _send_events(line, seen, [named[part] for part in parts], last)
        if then:
            getattr(line, then)()

    return reply


REPLIES: dict[str, Reply] = {
    "ok": whole_or_stream,
    "dated": dated,
    # framing
    "in-pieces": _whole(whole_chunked, stream_in_pieces),
    "odd-chunks": _whole(odd_chunks, stream_odd_chunks),
    "until-close": _whole(until_close, stream_until_close),
    "old-http": old_http,
    "informed-first": informed_first,
    "at-once": stream_at_once,
    "one-chunk": stream_one_chunk,
    "with-length": stream_with_length,
    "late-end": stream_late_end,
    "no-end": _stream_of("role", "token", "finish", "done", last=b""),
    "crlf": stream_crlf,
    "comments": stream_comments,
    "extra-bytes": extra_bytes,
    "evil-headers": evil_headers,
    # ends that are no ends
    "rst-before": raw(b"", "reset"),
    "fin-before": raw(b"", "close"),
    "rst-mid": half_then_reset,
    "fin-mid": half_then_fin,
    "truncated-json": truncated_json,
    "long-length": long_length,
    "short-length": short_length,
    "no-done": _stream_of("role", "token", "finish"),
    "clean-end": _stream_of("role", "token"),
    "done-unfinished": _stream_of("role", "token", "done"),
    "done-alone": _stream_of("done"),
    "empty": _stream_of(),
    "role-alone": _stream_of("role"),
    "role-fin": _stream_of("role", last=b"", then="close"),
    "torn-end": _stream_of("role", "token", "partial"),
    # events
    "error-first": _stream_of("role", "error"),
    "full-first": _stream_of("full"),
    "error-mid": _stream_of("role", "token", "error", "done"),
    "malformed": _stream_of("role", "token", "malformed", "token", "finish", "done"),
    "malformed-first": _stream_of("malformed", "role", "token", "finish", "done"),
    "torn": _stream_of("role", "token", "torn", "token", "finish", "done"),
    "torn-marked": _stream_of("role", "token", "torn-marked", "token", "finish", "done"),
    "damaged": _stream_of("role", "token", "damaged", "token", "finish", "done"),
    "two-lines": _stream_of("role", "token", "two-lines", "token", "finish", "done"),
    "unquoted": _stream_of("role", "token", "unquoted", "token", "finish", "done"),
    "not-utf8": _stream_of("role", "token", "not-utf8", "token", "finish", "done"),
    "huge-event": _stream_of("role", "token", "huge", "finish", "done"),
    "endless-event": _stream_of("role", "token", "endless"),
    "usage-first": _stream_of("usage", "role", "token", "finish", "done"),
    "comment-first": _stream_of("comment", "role", "token", "finish", "done"),
    # heads that are not HTTP
    "garbage": raw(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"),
    "two-lengths": raw(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{} "),
    "length-and-chunks": raw(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}"),
    "bad-chunk": raw(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n"),
    "bare-lf": raw(b"HTTP/1.1 200 OK\ncontent-length: 2\n\n{}" + b"\r\n\r\n"),
    "tiny-chunks": raw(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 20_000),
    "huge-head": raw(b"HTTP/1.1 200 OK\r\nx-a: " + b"a" * 40_000),
    "switch": raw(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n"),
    "empty-json": _status(b"200 OK", body=b""),
    "not-text": _status(b"200 OK", body=b'{"choices":[{"message":{"content":"\xff\xfe"}}]}'),
    "not-json": _status(b"200 OK", body=b"<html>hello</html>"),
    # statuses
    "500": _status(b"500 Internal Server Error"),
    "502": _status(b"502 Bad Gateway"),
    "503": _status(b"503 Service Unavailable"),
    "503-full": _status(b"503 Service Unavailable", b"retry-after: 3\r\n"),
    "504": _status(b"504 Gateway Timeout"),
    "529": _status(b"529 Overloaded"),
    "429": _status(b"429 Too Many Requests", b"retry-after: 7\r\n"),
    "401": _status(b"401 Unauthorized"),
    "403": _status(b"403 Forbidden"),
    "404": _status(b"404 Not Found"),
    "405": _status(b"405 Method Not Allowed"),
    "501": _status(b"501 Not Implemented"),
    "400": _status(b"400 Bad Request", b"set-cookie: a=b\r\n"),
    "422": _status(b"422 Unprocessable Entity"),
    "302": _status(b"302 Found", b"location: http://127.0.0.1:1/\r\n"),
    "304": raw(b"HTTP/1.1 304 Not Modified\r\n\r\n"),
    "204": raw(b"HTTP/1.1 204 No Content\r\n\r\n"),
    # time
    "stale": stale,
    "silent": silent,
    "held": held,
    "held-early": held_early,
    "slow": slow,
}
