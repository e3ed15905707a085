"""Joining responses by token ids: cut once or twice, text and ids are those of the uncut response."""

import json
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fleetgate.protocols import sse
from fleetgate.protocols.clients.openai import OPERATIONS
from fleetgate.protocols.clients.openai_resume import resume_methods
from fleetgate.protocols.messages import Operation, ResumeMethod
from fleetgate.protocols.resume.token_ids import TokenSplicer, mark_of, tokens_body
from fleetgate.protocols.resume.transcript import Transcript
from tests.loopback.token_engine import TokenEngine
from tests.loopback.wall_replies import DONE

CHAT, COMPLETIONS = OPERATIONS[b"/v1/chat/completions"], OPERATIONS[b"/v1/completions"]
MARK = 7


def events_of(engine: TokenEngine, body: bytes) -> list[bytes]:
    """What the engine answers."""
    asked = json.loads(body)
    seen: Any = SimpleNamespace(ask=asked, model=asked["model"])
    return [event for event in engine.events(seen) if event != DONE]


def told(events: list[bytes]) -> tuple[str, list[int], list[str]]:
    """Text, token ids and finish reasons."""
    choices = [choice for event in events for choice in json.loads(event[6:])["choices"]]
    text = "".join((c.get("delta") or {}).get("content") or c.get("text") or "" for c in choices)
    ends = [c["finish_reason"] for c in choices if c["finish_reason"]]
    return text, [number for c in choices for number in c.get("token_ids") or ()], ends


def gone_on(body: bytes, transcript: Transcript, operation: Operation) -> list[bytes] | None:
    """What another engine adds; None if it cannot be asked to continue."""
    further = tokens_body(body, transcript)
    if further is None:
        return None
    splicer = TokenSplicer(transcript, "asked", operation)
    taken = [splicer.take(sse.data_of(event) or b"") for event in events_of(TokenEngine("other"), further)]
    return [event for event in taken if event is not None]


@given(
    st.data(),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
    st.booleans(),
    st.none() | st.integers(1, 60),
)
def test_text_and_ids_are_those_of_the_uncut_answer(
    data: st.DataObject, prompt: str, is_chat: bool, tokens_max: int | None
) -> None:
    what: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]} if is_chat else {"prompt": prompt}
    asked = {"model": "m", "stream": True, "temperature": 0.7, "return_token_ids": True, **what}
    body = json.dumps(asked if tokens_max is None else {**asked, "max_tokens": tokens_max}).encode()
    operation = CHAT if is_chat else COMPLETIONS
    assert ResumeMethod.TOKENS in resume_methods(body, operation)
    whole = events_of(TokenEngine("one"), body)
    transcript, before, events = Transcript(MARK), list[bytes](), whole
    for _ in range(data.draw(st.integers(1, 2))):
        more = events[: data.draw(st.integers(0, len(events) - 1))]
        for event in more:
            transcript.keep(event)
        before += more
        further = gone_on(body, transcript, operation)
        if further is None:
            text, ids, _ = told(before)
            limit = tokens_max if tokens_max is not None else 1000 if is_chat else 16
            assert not text or len(ids) >= limit, "only what says nothing yet, or has no token left"
            return
        events = further
    assert told(before + events) == told(whole)
    heads = [json.loads(event[6:]) for event in before + events]
    assert len({(one["id"], one["created"], one["object"]) for one in heads}) == 1
    assert all(one["model"] == "asked" for one in heads[len(before) :])


def test_marks_tell_models_and_ids_apart() -> None:
    marks = {mark_of(model, ids) for model in ("m", "n") for ids in ([1, 2], [12], [1, 2, 3])}
    assert len(marks) == 6 and min(marks) > 1 and max(marks) < 2**63
