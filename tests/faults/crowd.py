"""Many clients at a steady rate, each request with a mark of its own; what they saw is one side of the oracle."""

import asyncio
import itertools
import json
import random
from collections.abc import Sequence

from tests.faults.oracle import Asked, End, Got
from tests.loopback.test_resume import WORDS, events_of
from tests.loopback.wall import Line, Seen, Wall
from tests.loopback.wall_replies import CHUNKED, EVENT_STREAM, LAST, answer, chunk

TEXT = "".join(WORDS)
PACE_S = 0.004
ANSWER_S_MAX = 60.0
RETRIES = 2  # as the official SDKs
RETRY_S_MAX = 0.5  # they would wait as told, up to 60 s: less is harder


async def engine(line: Line, seen: Seen) -> None:
    """Every engine says the same text, streamed or whole."""
    if not seen.ask.get("stream"):
        body = answer(seen.model, TEXT)
        line.end()
        line.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )
        return
    line.write(EVENT_STREAM + CHUNKED)
    for one in events_of(seen):
        line.write(chunk(one))
        await asyncio.sleep(PACE_S)
    line.end()
    line.write(LAST)


async def out_of_order(line: Line, seen: Seen) -> None:
    """No engine works."""
    line.end()
    line.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\n{}")


def got(walls: Sequence[Wall]) -> list[Got]:
    """What walls were asked for."""
    return [
        Got(number, serial, str(seen.ask.get("messages", [{}])[0].get("content", seen.path)))
        for number, wall in enumerate(walls)
        for serial, seen in enumerate(wall.seen)
    ]


class Crowd:
    """Clients of one port, and their ledger."""

    def __init__(self, port: int, name: str, seed: int) -> None:
        self.asked: list[Asked] = []
        self._port = port
        self._name = name
        self._dice = random.Random(seed)
        self._marks = itertools.count()

    async def run(self, rate: float, for_s: float, retries: int = 0) -> int:
        """Ask at a steady rate and wait for all answers; how many were asked, retries not counted."""
        loop = asyncio.get_running_loop()
        began_s, tasks = loop.time(), []
        for number in range(int(rate * for_s)):
            await asyncio.sleep(began_s + number / rate - loop.time())
            stream, sampled = self._dice.random() < 0.5, self._dice.random() < 0.5
            fields: dict[str, object] = {"stream": stream, "temperature": 0.7 if sampled else 0}
            tasks.append(loop.create_task(self._ask_and_again(fields, retries)))
        await asyncio.gather(*tasks)
        return len(tasks)

    async def _ask_and_again(self, fields: dict[str, object], retries: int) -> None:
        for count in range(retries + 1):
            mark = f"{self._name}-{next(self._marks)}"
            row, headers = await self._ask(mark, fields, count)
            self.asked.append(row)
            wished = headers.get("x-should-retry", "true" if row.status in (408, 409, 429) or row.status >= 500 else "")
            if row.status and wished != "true":
                return
            await asyncio.sleep(min(RETRY_S_MAX, float(headers.get("retry-after", RETRY_S_MAX))))

    async def _ask(self, mark: str, fields: dict[str, object], count: int) -> tuple[Asked, dict[str, str]]:
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": mark}], **fields}).encode()
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: chat.test", "Content-Type: application/json"]
        lines += [f"x-stainless-retry-count: {count}", "Connection: close", f"Content-Length: {len(body)}"]
        headers: dict[str, str] = {}
        try:
            async with asyncio.timeout(ANSWER_S_MAX):
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                writer.write(("\r\n".join(lines) + "\r\n\r\n").encode() + body)
                rows = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (row.partition(":") for row in rows[1:])}
                status = int(rows[0].split()[1])
                payload, whole = await _body(reader, headers)
                writer.close()
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            return Asked(mark, headers.get("x-request-id", ""), 0, 0, "lost"), headers
        end = _judge(status, payload, whole, bool(fields["stream"]))
        code = str(json.loads(payload)["error"]["code"]) if end == "refused" else ""
        attempts = int(headers.get("x-fleetgate-attempts", 0))
        return Asked(mark, headers["x-request-id"], status, attempts, end, code), headers


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> tuple[bytes, bool]:
    parts = []
    try:
        if "content-length" in headers:
            return await reader.readexactly(int(headers["content-length"])), True
        while size := int(await reader.readuntil(b"\r\n"), 16):
            parts.append((await reader.readexactly(size + 2))[:-2])
    except (asyncio.IncompleteReadError, ConnectionError):
        return b"".join(parts), False
    return b"".join(parts), True


def _judge(status: int, payload: bytes, whole: bool, stream: bool) -> End:
    if status != 200:
        return "refused"
    if not stream:
        return "exact" if whole and json.loads(payload)["choices"][0]["message"]["content"] == TEXT else "wrong"
    events = [json.loads(one[6:]) for one in payload.split(b"\n\n") if one.startswith(b"data: {")]
    said = "".join(choice["delta"].get("content") or "" for one in events for choice in one.get("choices", ()))
    if not TEXT.startswith(said):
        return "wrong"
    if events and "error" in events[-1]:
        return "told" if said else "lost"
    if not whole:
        return "cut"
    return "exact" if said == TEXT and payload.endswith(b"data: [DONE]\n\n") else "silent"
