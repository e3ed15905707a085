"""Answers that broke off half-way go on from another Deployment, or end loudly."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from fleetgate.core.model import Resilience
from fleetgate.ipc.shared_memory import EndpointSignal
from tests.loopback.wall import Line, Reply, Seen
from tests.loopback.wall_client import Answer, request
from tests.loopback.wall_replies import (
    CHUNKED,
    DONE,
    EVENT_STREAM,
    LAST,
    chunk,
    event,
    finish,
    role,
    usage_event,
)
from tests.loopback.wall_rig import Plane, plane
from tests.waiting import wait_for

WORDS = [
    f"{number} {text}" for number, text in enumerate(["plain ", "é→😀 ", 'a " quote ', "line\nbreak ", "\\u0041 "] * 8)
]
PATIENCE = {"fleetgate.core.health.timeouts.STALL_UNKNOWN_S": 1.0, "fleetgate.core.health.timeouts.STALL_MIN_S": 1.0}
ENDS = ("rst", "fin", "clean", "stall", "error", "malformed")


def events_of(seen: Seen) -> list[bytes]:
    """A deterministic answer; an engine that is asked to go on says what is left of it, as templates do that strip."""
    words = list(WORDS)
    last = seen.ask["messages"][-1]
    if last["role"] == "assistant":
        said = str(last["content"]).strip()
        assert "".join(words).startswith(said)
        words = ["".join(words)[len(said) :]]
    if "tools" in seen.ask:
        pieces: list[dict[str, Any]] = [
            {"tool_calls": [{"index": 0, "id": f"call_{id(seen)}", "type": "function", "function": {"name": "f"}}]},
            *({"tool_calls": [{"index": 0, "function": {"arguments": word}}]} for word in words),
        ]
    else:
        pieces = [{"content": word} for word in words]
    made = [role(seen.model), *(event(seen.model, piece) for piece in pieces), finish(seen.model)]
    return [*made, *([usage_event(seen.model)] if seen.ask.get("stream_options") else []), DONE]


def breaking(how: str) -> Reply:
    """An engine that breaks off after `wall.cut` events."""

    async def reply(line: Line, seen: Seen) -> None:
        line.write(EVENT_STREAM + CHUNKED)
        for one in events_of(seen)[: seen.option("cut", 10)]:
            line.write(chunk(one))
            await asyncio.sleep(0)
        await line.flush()
        await asyncio.sleep(0.02)
        if how == "stall":
            await line.gone.wait()
        elif how == "rst":
            line.reset()
        elif how == "fin":
            line.close()
        else:
            last = {"error": b'data: {"error":{"message":"no"}}\n\n', "malformed": b"data: {broken\n\n", "clean": b""}
            line.write((chunk(last[how]) if last[how] else b"") + LAST)
            line.end()

    return reply


async def well(line: Line, seen: Seen) -> None:
    """The whole answer, in chunks that hold several events."""
    line.write(EVENT_STREAM + CHUNKED)
    payload = b"".join(events_of(seen))
    for at in range(0, len(payload), 700):
        line.write(chunk(payload[at : at + 700]))
        await asyncio.sleep(0)
    line.end()
    line.write(LAST)


async def forgets(line: Line, seen: Seen) -> None:
    """Begins anew whatever was said before."""
    seen.ask["messages"] = seen.ask["messages"][:1]
    await well(line, seen)


async def otherwise(line: Line, seen: Seen) -> None:
    """Another answer."""
    line.write(EVENT_STREAM + CHUNKED)
    for one in (role(seen.model), event(seen.model, {"content": "0 plain 1 other"}), finish(seen.model), DONE):
        line.write(chunk(one))
    line.end()
    line.write(LAST)


REPLIES = {**{how: breaking(how) for how in ENDS}, "well": well, "forgets": forgets, "otherwise": otherwise}
GOES_ON = {"models": {"m": "well"}}
CHUNK = {"tools": [{"type": "function", "function": {"name": "f"}}]}


@pytest.fixture(scope="module")
def three() -> Iterator[Plane]:
    with plane(walls=3, patience=PATIENCE) as made:
        for wall in made.walls:
            wall.replies.update(REPLIES)
        yield made


def use(made: Plane, *engines: str, **options: object) -> None:
    """A Deployment for each engine named."""
    made.use(*({"models": {"m": name}} for name in engines), **options)


def ask(made: Plane, cut: int = 10, **fields: Any) -> Answer:
    """A greedy stream."""
    return made.ask(request("m", stream=True, **{"temperature": 0, "wall": {"cut": cut}, **fields}))


def read(body: bytes) -> tuple[str, list[dict[str, object]]]:
    """The text that its client reads, and all events."""
    events = [json.loads(one[6:]) for one in body.split(b"\n\n") if one.startswith(b"data: {")]
    said = ""
    for one in events:
        for choice in one.get("choices", ()):
            calls = choice["delta"].get("tool_calls", ())
            said += choice["delta"].get("content") or "".join(c["function"].get("arguments", "") for c in calls)
    return said, events


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("cut", [2, 17, 41])
def test_a_greedy_answer_goes_on_elsewhere(three: Plane, how: str, cut: int) -> None:
    use(three, how, "well")
    answer = ask(three, cut)
    said, events = read(answer.body)
    assert answer.status == 200 and answer.whole and said == "".join(WORDS)
    assert answer.body.endswith(DONE) and answer.headers["x-fleetgate-deployment"] == "one"
    assert b": fleetgate deployment=two region=region-two attempts=2\n\n" in answer.body
    assert {one["model"] for one in events} == {"m"} and {one["id"] for one in events} == {"w"}
    assert three.walls[0].seen[0].body.replace(b'"rst"', b'"well"')[-60:] == three.walls[1].seen[0].body[-60:]
    three.wait_idle()


def test_a_tool_call_goes_on_in_the_middle_of_its_arguments(three: Plane) -> None:
    use(three, "rst", "well")
    answer = ask(three, 20, **CHUNK)
    said, events = read(answer.body)
    assert answer.whole and said == "".join(WORDS)
    calls = [call for one in events for choice in one["choices"] for call in choice["delta"].get("tool_calls", ())]  # type: ignore[attr-defined]
    assert len([call for call in calls if "id" in call]) == 1


def test_it_goes_on_twice(three: Plane) -> None:
    use(three, "rst", "fin", "well")
    answer = ask(three, 12)
    assert answer.whole and read(answer.body)[0] == "".join(WORDS), "the second broke off before it was caught up"


def test_after_two_it_ends_loudly(three: Plane) -> None:
    use(three, "rst", "fin", "stall")
    ends_loudly(three, ask(three, 12))


def ends_loudly(made: Plane, answer: Answer) -> None:
    """What came is right, then an error, and no clean end."""
    said, events = read(answer.body)
    assert "".join(WORDS).startswith(said) and said
    assert events[-1]["error"]["code"] == "upstream_interrupted"  # type: ignore[index]
    assert not answer.whole and DONE not in answer.body
    made.wait_idle()


def test_another_answer_is_never_mixed_in(three: Plane) -> None:
    use(three, "rst", "otherwise", "well")
    ends_loudly(three, ask(three))
    assert not three.seen(2), "nobody can say which of two answers is right"
    three.use({"models": {"m": "otherwise"}})  # and nothing is held against who answered otherwise
    assert ask(three).whole


@pytest.mark.parametrize(
    "wish", [{"temperature": 0.7}, {"n": 2}, {"logprobs": True}, {"modalities": ["text", "audio"]}], ids=str
)
def test_what_cannot_be_proved_ends_loudly(three: Plane, wish: dict[str, Any]) -> None:
    use(three, "rst", "well")
    ends_loudly(three, ask(three, **wish))
    assert not three.seen(1)


def test_resume_off_ends_loudly(three: Plane) -> None:
    use(three, "rst", "well", resilience=Resilience(resume="off"))
    ends_loudly(three, ask(three))


def test_a_client_that_leaves_meanwhile_frees_the_second(three: Plane) -> None:
    use(three, "rst", "stall")
    with three.client() as client:
        client.send(request("m", stream=True, temperature=0, wall={"cut": 5}))
        wait_for(lambda: three.walls[1].active == 1)
    three.wait_idle()


def test_a_sampled_answer_goes_on_where_the_engine_was_seen_to(three: Plane) -> None:
    """Three engines, of which only the last goes on as it began; one is of a kind that is never asked."""
    three.use({"models": {"m": "rst"}}, {"models": {"m": "forgets"}, "engine": "vllm"}, {**GOES_ON, "engine": "vllm"})
    wait_for(lambda: len(three.walls[2].seen) >= 2)
    probes = [list(wall.seen) for wall in three.walls]
    assert not probes[0] and all(seen.ask["max_tokens"] <= 16 for seen in probes[1] + probes[2])
    wait_for(lambda: [three.rig.board.signal(slot, EndpointSignal.PREFILL) for slot in three.slots] == [0, 2, 1])
    three.rig.wait_a_look()  # to try until it works would open the first one's breaker
    for wall in three.walls:
        wall.forget()
    answer = ask(three, 12, temperature=0.7, max_tokens=100)
    said, _ = read(answer.body)
    assert said == "".join(WORDS) and answer.whole
    assert not three.seen(1)
    asked = three.walls[2].seen[0].ask
    assert asked["messages"][-1] == {"role": "assistant", "content": "".join(WORDS[:11]).rstrip()}
    assert asked["max_tokens"] == 90 and asked["continue_final_message"]
