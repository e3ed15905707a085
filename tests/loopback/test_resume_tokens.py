"""Sampled answers that broke off go on from an engine that is given the ids of every token that was said."""

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from fleetgate.ipc.shared_memory import EndpointSignal
from tests.faults.test_random_cuts import NO_BREAKER
from tests.loopback.token_engine import TokenEngine
from tests.loopback.wall import Seen
from tests.loopback.wall_client import Answer, post
from tests.loopback.wall_replies import DONE
from tests.loopback.wall_rig import Plane, plane
from tests.waiting import wait_for

CUTS = 60
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ONE_ANSWER = {"id", "created", "model", "object"}


class Engines:
    """Three engines behind a Gateway; the second has another tokenizer, and nobody may mix its ids with the others'."""

    def __init__(self, made: Plane) -> None:
        self.plane = made
        self.all = [TokenEngine("one"), TokenEngine("two", tokenizer=500), TokenEngine("three")]
        for wall, engine in zip(made.walls, self.all, strict=True):
            wall.replies["m"] = engine.reply
        made.use(*({"models": {"m": "m"}, "engine": "vllm"} for _ in self.all))
        wait_for(lambda: all(self.mark(slot) for slot in made.slots))
        made.rig.wait_a_look()
        made.wait_idle()

    def mark(self, slot: int) -> int:
        """What the probe found."""
        return self.plane.rig.board.signal(slot, EndpointSignal.TOKENS)

    def ask(self, path: str, cut: int, **fields: Any) -> Answer:
        """One sampled stream, which the first engine breaks off."""
        for wall in self.plane.walls:
            wall.forget()
        self.all[0].cut = cut
        what = (
            {"messages": [{"role": "user", "content": "é?"}]} if path == CHAT else {"prompt": "é?", "max_tokens": 200}
        )
        body = {"model": "m", "stream": True, "temperature": 0.7, "return_token_ids": True, **what, **fields}
        return self.plane.ask(post(json.dumps(body).encode(), path=path))


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    with plane(walls=3, patience=NO_BREAKER) as made:
        yield Engines(made)


def events_of(answer: Answer) -> list[dict[str, Any]]:
    """Every event of an answer that has data."""
    return [json.loads(one[6:]) for one in answer.body.split(b"\n\n") if one.startswith(b"data: {")]


def told(events: list[dict[str, Any]]) -> tuple[str, list[int], list[str], Any]:
    """Text, token ids, finish reasons and usage, as their client reads them."""
    choices = [choice for one in events for choice in one["choices"]]
    text = "".join((c.get("delta") or {}).get("content") or c.get("text") or "" for c in choices)
    ids = [number for c in choices for number in c.get("token_ids") or ()]
    ends = [c["finish_reason"] for c in choices if c["finish_reason"]]
    return text, ids, ends, [one["usage"] for one in events if one.get("usage")]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_sampled_answer_goes_on_byte_for_byte_wherever_it_was_cut(engines: Engines, path: str) -> None:
    options = {"stream_options": {"include_usage": True}}
    expected = told(events_of(engines.ask(path, 0, **options)))
    assert len(expected[1]) > 40 and expected[2] == ["stop"] and len(expected[3]) == 1
    begins, chooser = 0, random.Random(3)
    for cut in chooser.sample(range(2, 41), CUTS // 2):
        answer = engines.ask(path, cut, **options)
        events = events_of(answer)
        assert answer.whole and answer.body.endswith(DONE), cut
        assert told(events) == expected, f"cut after {cut} events"
        assert all(len({str(one[name]) for one in events}) == 1 for name in ONE_ANSWER), f"cut after {cut} events"
        assert not engines.plane.seen(1), "it counts its tokens otherwise"
        again = engines.plane.walls[2].seen
        assert [seen.path for seen in again] == [COMPLETIONS] and isinstance(again[0].ask["prompt"], list)
        begins += cut_in_a_character(engines.plane.walls[0].seen[0], again[0], cut, path)
    assert begins, "some were cut inside a character"
    engines.plane.wait_idle()


def test_a_greedy_answer_is_replayed_and_its_ids_are_told_once(engines: Engines) -> None:
    expected = told(events_of(engines.ask(CHAT, 0, temperature=0)))
    engines.all[1].tokenizer = 0  # any engine may replay, so all must say the same
    try:
        for cut in range(2, 40, 3):
            assert told(events_of(engines.ask(CHAT, cut, temperature=0))) == expected, f"cut after {cut} events"
            assert engines.plane.walls[1].seen[0].path == CHAT
    finally:
        engines.all[1].tokenizer = 500


def cut_in_a_character(first: Seen, second: Seen, cut: int, path: str) -> bool:
    """Whether the second engine was asked to begin before the last id that the first had told."""
    prompt = len(TokenEngine("").prompt_ids(first.ask))
    return len(second.ask["prompt"]) - prompt < (cut - 1 if path == CHAT else cut)


def test_the_length_that_the_client_allows_holds_for_both_parts(engines: Engines) -> None:
    answer = engines.ask(CHAT, 12, max_tokens=20)
    _, ids, ends, _ = told(events_of(answer))
    assert answer.whole and len(ids) == 20 and ends == ["length"]
    assert not engines.plane.seen(1)


REFUSED: list[dict[str, Any]] = [
    {"stop": ["end"]},
    {"frequency_penalty": 0.5},
    {"logprobs": True},
    {"n": 2},
    {"a_field_nobody_knows": 1},
    {"return_token_ids": False},
]


@pytest.mark.parametrize("wish", REFUSED, ids=str)
def test_what_token_ids_cannot_carry_is_never_gone_on_with_by_them(engines: Engines, wish: dict[str, Any]) -> None:
    answer = engines.ask(CHAT, 12, **wish)
    asked = [seen.path for wall in engines.plane.walls for seen in wall.seen]
    assert COMPLETIONS not in asked
    assert not answer.whole and events_of(answer)[-1]["error"]["code"] == "upstream_interrupted"


def test_tokens_that_came_together_may_end_inside_a_character(engines: Engines) -> None:
    engines.all[0].together = 2
    try:
        answer = engines.ask(CHAT, 9)
    finally:
        engines.all[0].together = 1
    assert not answer.whole and events_of(answer)[-1]["error"]["code"] == "upstream_interrupted"


def test_only_engines_with_the_same_ids_have_the_same_mark(engines: Engines) -> None:
    one, two, three = (engines.mark(slot) for slot in engines.plane.slots)
    assert one == three != two and min(one, two) > 1
