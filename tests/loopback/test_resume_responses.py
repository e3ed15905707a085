"""Greedy streams of `/v1/responses` that broke off go on elsewhere, or end loudly."""

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.test_random_cuts import NO_BREAKER
from tests.loopback.wall import Line, Seen
from tests.loopback.wall_client import Answer, post
from tests.loopback.wall_replies import CHUNKED, EVENT_STREAM, LAST, chunk
from tests.loopback.wall_rig import Plane, plane

WORDS = ["plain ", "é→😀 ", 'a " quote ', "line\nbreak ", "\\u0041 ", "end"] * 2


class Talker:
    """A wall's answers: a reasoning item, a message and a tool call, with ids of its own."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size  # characters of a delta: engines cut text each in its own way
        self.cut = 0
        self.says = WORDS

    def events(self, asked: dict[str, Any]) -> list[bytes]:
        """The whole response."""
        made: list[tuple[str, dict[str, Any]]] = []
        text = "".join(self.says)
        pieces = [text[at : at + self.size] for at in range(0, len(text), self.size)]
        response = {
            "id": f"resp_{self.name}",
            "object": "response",
            "created_at": len(self.name),
            "model": asked["model"],
        }
        for kind in ("created", "in_progress"):
            made.append((kind, {"response": {**response, "status": "in_progress", "output": []}}))
        items: list[dict[str, Any]] = [
            {"type": "reasoning", "id": f"rs_{self.name}"},
            {"type": "message", "id": f"msg_{self.name}"},
            {"type": "function_call", "id": f"fc_{self.name}", "call_id": f"call_{self.name}", "name": "f"},
        ]
        for index, kind in enumerate(("reasoning_text", "output_text", "function_call_arguments")):
            item = items[index]
            place = {"item_id": item["id"], "output_index": index, "content_index": 0}
            made.append(("output_item.added", {"output_index": index, "item": item}))
            made.append(("content_part.added", {**place, "part": {"type": kind, "text": ""}}))
            made += [(f"{kind}.delta", {**place, "delta": piece}) for piece in pieces]
            made.append((f"{kind}.done", {**place, "text": text}))
            made.append(("content_part.done", {**place, "part": {"type": kind, "text": text}}))
            made.append(("output_item.done", {"output_index": index, "item": {**item, "text": text}}))
        usage = {"input_tokens": 3, "output_tokens": 36, "total_tokens": 39}
        made.append(("completed", {"response": {**response, "status": "completed", "output": items, "usage": usage}}))
        return [
            b"event: response.%b\ndata: %b\n\n"
            % (kind.encode(), json.dumps({"type": f"response.{kind}", "sequence_number": number, **fields}).encode())
            for number, (kind, fields) in enumerate(made)
        ]

    async def reply(self, line: Line, seen: Seen) -> None:
        """Answer, or break off after `cut` events."""
        events, cut = self.events(seen.ask), self.cut
        line.write(EVENT_STREAM + CHUNKED)
        for one in events[: cut or None]:
            line.write(chunk(one))
            await asyncio.sleep(0)
        if not cut:
            line.end()
            line.write(LAST)
            return
        await line.flush()
        await asyncio.sleep(0.02)
        line.reset()


class Talkers:
    """Two of them behind a Gateway; the first breaks off."""

    def __init__(self, made: Plane) -> None:
        self.plane = made
        self.first, self.second = Talker("first", 3), Talker("second", 7)
        made.walls[0].replies["m"], made.walls[1].replies["m"] = self.first.reply, self.second.reply
        made.use({"models": {"m": "m"}}, {"models": {"m": "m"}})

    def ask(self, cut: int, **fields: Any) -> Answer:
        """One stream, broken off after `cut` events."""
        self.first.cut = cut
        for wall in self.plane.walls:
            wall.forget()
        body = {"model": "m", "input": "hi", "stream": True, "temperature": 0, **fields}
        return self.plane.ask(post(json.dumps(body).encode(), path="/v1/responses"))


@pytest.fixture(scope="module")
def talkers() -> Iterator[Talkers]:
    with plane(walls=2, patience=NO_BREAKER) as made:
        yield Talkers(made)


def events_of(answer: Answer) -> list[dict[str, Any]]:
    """What its client reads."""
    rows = [row for event in answer.body.split(b"\n\n") for row in event.split(b"\n") if row.startswith(b"data: {")]
    return [json.loads(row[6:]) for row in rows]


def built(events: list[dict[str, Any]]) -> list[Any]:
    """The events with adjacent deltas joined, without their numbers."""
    made: list[Any] = []
    for event in events:
        del event["sequence_number"]
        if "delta" in event and made and made[-1]["type"] == event["type"]:
            made[-1]["delta"] += event["delta"]
        else:
            made.append(event)
    return made


# An item that began behind the seam has the second engine's ids.
OWN_IDS = re.compile(r"\b(rs|msg|fc|call)_second\b")


def ids_of(events: list[dict[str, Any]]) -> set[str]:
    """Every id of an item or a call."""
    return set(re.findall(r"\b(?:rs|msg|fc|call)_(?:first|second)", json.dumps(events)))


def test_a_greedy_response_goes_on_wherever_it_was_cut(talkers: Talkers) -> None:
    whole = talkers.first.events({"model": "m"})
    expected = built(events_of(talkers.ask(0)))
    firsts = next(at for at, event in enumerate(whole) if b".delta" in event) + 1
    for cut in range(firsts, len(whole), 3):
        answer = talkers.ask(cut)
        events = events_of(answer)
        assert answer.whole, f"cut after {cut}"
        assert [event["sequence_number"] for event in events] == list(range(len(events))), f"cut after {cut}"
        assert len(ids_of(events)) == 4, "each item has one id, the call one more"
        assert built(json.loads(OWN_IDS.sub(r"\1_first", json.dumps(events)))) == expected, f"cut after {cut}"
        assert len(talkers.plane.walls[1].seen) == 1
    talkers.plane.wait_idle()


@pytest.mark.parametrize(
    "wish",
    [
        {"temperature": 0.7},
        {"background": True},
        {"previous_response_id": "resp_x"},
        {"tools": [{"type": "web_search"}]},
        {"include": ["message.output_text.logprobs"]},
    ],
    ids=str,
)
def test_what_cannot_be_replayed_ends_loudly(talkers: Talkers, wish: dict[str, Any]) -> None:
    ends_loudly(talkers.ask(40, **wish))
    assert not talkers.plane.seen(1)


def ends_loudly(answer: Answer) -> None:
    """An error and no clean end."""
    assert not answer.whole and events_of(answer)[-1]["error"]["code"] == "upstream_interrupted"


@pytest.mark.parametrize("word", [0, 5])
def test_another_response_is_never_mixed_in(talkers: Talkers, word: int) -> None:
    talkers.second.says = [*WORDS[:word], "other", *WORDS[word + 1 :]]
    try:
        answer = talkers.ask(40)
    finally:
        talkers.second.says = WORDS
    ends_loudly(answer)
    assert "other" not in answer.body.decode()
