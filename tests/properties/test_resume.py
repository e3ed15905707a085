"""Joining two responses: wherever the first was cut, the client reads one response, or nothing that may be wrong."""

import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fleetgate.protocols import sse
from fleetgate.protocols.clients.openai import OPERATIONS
from fleetgate.protocols.clients.openai_resume import resume_methods
from fleetgate.protocols.http1 import chunk
from fleetgate.protocols.messages import ResumeMethod, Usage
from fleetgate.protocols.resume.prefill import prefill_body
from fleetgate.protocols.resume.splice import Mismatch, StreamSplicer
from fleetgate.protocols.resume.transcript import KEPT_CHARS_MAX, Transcript

CHAT, COMPLETIONS = OPERATIONS[b"/v1/chat/completions"], OPERATIONS[b"/v1/completions"]
Run = tuple[str, str]
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
channels = st.sampled_from(["content", "reasoning_content", "refusal", "0.arguments", "1.arguments"])


@st.composite
def responses(draw: st.DrawFn) -> list[Run]:
    """The content of a response: runs of text, tool calls beginning with their name."""
    runs: list[Run] = []
    named: set[str] = set()
    for channel in draw(st.lists(channels, min_size=1, max_size=6)):
        call, _, kind = channel.partition(".")
        if kind and call not in named:
            named.add(call)
            runs.append((f"{call}.name", draw(texts)))
        runs.append((channel, draw(texts)))
    return runs


def delta_of(channel: str, text: str, call_id: str) -> dict[str, Any]:
    """One piece as engines write it."""
    call, _, kind = channel.partition(".")
    if kind == "name":
        function = {"name": text, "arguments": ""}
        return {"tool_calls": [{"index": int(call), "id": call_id, "type": "function", "function": function}]}
    if kind:
        return {"tool_calls": [{"index": int(call), "function": {"arguments": text}}]}
    return {channel: text}


def event_of(delta: dict[str, Any], answer_id: str, finish: str | None = None) -> bytes:
    """One event."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    event = {"id": answer_id, "object": "chat.completion.chunk", "created": len(answer_id), "model": answer_id}
    return b"data: " + json.dumps({**event, "choices": [choice]}).encode() + b"\n\n"


@st.composite
def streams(draw: st.DrawFn, runs: list[Run], answer_id: str) -> list[bytes]:
    """A response as one engine splits it, up to its end."""
    events = [event_of({"role": "assistant", "content": ""}, answer_id)]
    for channel, text in runs:
        if channel.endswith(".name"):
            events.append(event_of(delta_of(channel, text, f"call-{answer_id}"), answer_id))
            continue
        while text:
            size = draw(st.integers(1, len(text)))
            events.append(event_of(delta_of(channel, text[:size], ""), answer_id))
            text = text[size:]
    return [*events, event_of({}, answer_id, "stop")]


def runs_of(events: list[bytes]) -> list[Run]:
    """What a client reads in events, adjacent pieces joined."""
    runs: list[Run] = []
    for event in events:
        for choice in json.loads(event[6:])["choices"]:
            delta = choice["delta"]
            pieces = [(name, delta[name]) for name in ("reasoning_content", "content", "refusal") if delta.get(name)]
            for call in delta.get("tool_calls", ()):
                for kind in ("name", "arguments"):
                    if call["function"].get(kind):
                        pieces.append((f"{call['index']}.{kind}", call["function"][kind]))
            for channel, text in pieces:
                if runs and runs[-1][0] == channel:
                    runs[-1] = (channel, runs[-1][1] + text)
                else:
                    runs.append((channel, text))
    return runs


def transcript_of(events: list[bytes]) -> Transcript:
    """The transcript of events, some of them in one chunk each."""
    transcript = Transcript()
    for number, event in enumerate(events):
        transcript.keep(chunk(event) if number % 2 else event)
    return transcript


def joined(splicer: StreamSplicer, events: list[bytes]) -> list[bytes]:
    """The events of a new response that the client gets."""
    left = [splicer.take(sse.data_of(event) or b"") for event in events]
    return [event for event in left if event is not None]


@given(st.data(), responses())
def test_the_client_reads_one_answer_wherever_it_was_cut(data: st.DataObject, runs: list[Run]) -> None:
    first, second = data.draw(streams(runs, "first")), data.draw(streams(runs, "second"))
    cut = data.draw(st.integers(2, len(first) - 1))
    before = first[:cut]
    transcript = transcript_of(before)
    assert transcript.runs == runs_of(before) and transcript.whole
    splicer = StreamSplicer(transcript, ResumeMethod.REPLAY, "asked")
    after = joined(splicer, second)
    assert runs_of(before + after) == runs_of(first)
    assert json.loads(after[-1][6:])["choices"][0]["finish_reason"] == "stop"
    for event in map(json.loads, (one[6:] for one in after)):
        assert (event["id"], event["created"], event["model"]) == ("first", 5, "asked")
    ids = [call["id"] for one in before + after for call in calls_of(one) if "id" in call]
    assert len(ids) == len({call["index"] for one in first for call in calls_of(one)}), "each call has one id"


def calls_of(event: bytes) -> list[dict[str, Any]]:
    """The tool calls of an event."""
    calls: list[dict[str, Any]] = json.loads(event[6:])["choices"][0]["delta"].get("tool_calls", [])
    return calls


@given(st.data(), responses(), responses())
def test_nothing_of_another_answer_is_passed_on(data: st.DataObject, runs: list[Run], others: list[Run]) -> None:
    first, second = data.draw(streams(runs, "first")), data.draw(streams(others, "second"))
    before = first[: data.draw(st.integers(2, len(first) - 1))]
    read, other = runs_of(before), runs_of(second)
    *same, (channel, text) = read
    assume(other[: len(same)] != same or len(other) <= len(same) or other[len(same)][0] != channel)
    assume(not (len(other) > len(same) and other[: len(same)] == same and other[len(same)][1].startswith(text)))
    splicer, passed = StreamSplicer(transcript_of(before), ResumeMethod.REPLAY, "asked"), []
    with pytest.raises(Mismatch):
        for event in second:
            passed.append(splicer.take(sse.data_of(event) or b""))
    assert not any(passed)


@given(st.data(), responses())
def test_a_second_break_is_joined_as_the_first(data: st.DataObject, runs: list[Run]) -> None:
    first, second, third = (data.draw(streams(runs, name)) for name in ("first", "second", "third"))
    client = first[: data.draw(st.integers(2, len(first) - 1))]
    transcript = transcript_of(client)
    splicer = StreamSplicer(transcript, ResumeMethod.REPLAY, "asked")
    for event in joined(splicer, second[: data.draw(st.integers(0, len(second) - 1))]):
        transcript.keep(event)
        client.append(event)
    client += joined(StreamSplicer(transcript, ResumeMethod.REPLAY, "asked"), third)
    assert runs_of(client) == runs_of(first)
    assert json.loads(client[-1][6:])["choices"][0]["finish_reason"] == "stop"


def test_what_cannot_be_compared_is_not_resumed() -> None:
    for odd in (
        {"choices": [{"index": 1, "delta": {"content": "x"}}]},
        {"choices": [{"index": 0, "delta": {"content": "x"}, "logprobs": {"content": []}}]},
        {"choices": [{"index": 0, "delta": {"audio": {"data": "x"}}}]},
        {"choices": [{"index": 0, "delta": {"content": [{"type": "text"}]}}]},
    ):
        assert not _whole([event_of({"content": "a"}, "a"), b"data: " + json.dumps(odd).encode() + b"\n\n"])
    assert _whole([event_of({"content": "a"}, "a"), b": comment\n\n", b"data: [DONE]\n\n"])
    assert not _whole([event_of({"content": "a" * (KEPT_CHARS_MAX + 1)}, "a")])


def _whole(events: list[bytes]) -> bool:
    transcript = transcript_of(events)
    return bool(transcript.runs) and transcript.whole


@pytest.mark.parametrize(
    ("fields", "methods"),
    [
        ({"temperature": 0}, {ResumeMethod.REPLAY, ResumeMethod.PREFILL}),
        ({"temperature": 0.0, "tools": [{}]}, {ResumeMethod.REPLAY}),
        ({"temperature": 0, "response_format": {"type": "json_object"}}, {ResumeMethod.REPLAY}),
        ({"top_k": 1}, {ResumeMethod.REPLAY, ResumeMethod.PREFILL}),
        ({}, {ResumeMethod.PREFILL}),
        ({"temperature": 0.7, "n": 1, "logprobs": False}, {ResumeMethod.PREFILL}),
        ({"temperature": 0.7, "tools": [{}]}, set()),
        ({"temperature": 0, "n": 2}, set()),
        ({"temperature": 0, "logprobs": True}, set()),
        ({"temperature": 0, "modalities": ["text", "audio"]}, set()),
        ({"temperature": "hot"}, set()),
        (
            {"temperature": 0.7, "return_token_ids": True},
            {ResumeMethod.TOKENS},
        ),  # new ids might differ
    ],
)
def test_what_a_request_allows(fields: dict[str, Any], methods: set[ResumeMethod]) -> None:
    body = json.dumps({"model": "m", "messages": [], "stream": True, **fields}).encode()
    assert resume_methods(body, CHAT) == methods
    assert resume_methods(body, OPERATIONS[b"/v1/embeddings"]) == frozenset()


def test_a_completion_goes_on_from_a_prompt_that_is_text() -> None:
    assert ResumeMethod.PREFILL in resume_methods(b'{"prompt":"a"}', COMPLETIONS)
    assert ResumeMethod.PREFILL not in resume_methods(b'{"prompt":[1,2]}', COMPLETIONS)
    assert ResumeMethod.PREFILL not in resume_methods(b'{"prompt":"a","echo":true}', COMPLETIONS)


@given(st.lists(texts, min_size=1, max_size=8), st.integers(1, 20), st.sampled_from((None, [], "stop", ["stop"])))
def test_an_engine_that_goes_on_is_asked_for_the_rest(parts: list[str], more: int, stop: Any) -> None:
    """It repeats what no prefix ends with: white space, which templates strip, and half words before a stop."""
    transcript, text = transcript_of([event_of({"content": part}, "first") for part in parts]), "".join(parts)
    question = {"role": "user", "content": "q"}
    asked: dict[str, Any] = {"model": "m", "messages": [question], "max_tokens": len(parts) + more, "stop": stop}
    body = prefill_body(json.dumps(asked).encode(), transcript, "vllm")
    head = text[: max(text.rfind(" "), text.rfind("\n"), 0)].rstrip() if stop else text.rstrip()
    if not head:
        assert body is None, "no text to continue"
        return
    assert body is not None
    again, sent = text[len(head) :], json.loads(body)
    tokens = sum(len("".join(parts[: at + 1])) <= len(head) for at in range(len(parts)))
    assert sent["messages"] == [question, {"role": "assistant", "content": head}]
    assert sent["max_tokens"] == asked["max_tokens"] - tokens
    assert sent["continue_final_message"] and not sent["add_generation_prompt"]
    assert "continue_final_message" not in json.loads(
        prefill_body(json.dumps(asked).encode(), transcript, "llamacpp") or b""
    )
    if tokens:
        assert prefill_body(json.dumps({**asked, "max_tokens": tokens}).encode(), transcript, "vllm") is None
    splicer = StreamSplicer(transcript, ResumeMethod.PREFILL, "asked")
    rest = [event_of({"role": "assistant", "content": ""}, "b"), *(event_of({"content": c}, "b") for c in again + "x")]
    assert runs_of(joined(splicer, rest)) == [("content", "x")]
    if again:
        with pytest.raises(Mismatch):
            joined(StreamSplicer(transcript, ResumeMethod.PREFILL, "asked"), [event_of({"content": "?" + again}, "b")])
    usage = splicer.counted(Usage(prompt_tokens=9 + tokens, completion_tokens=3))
    assert (usage.prompt_tokens, usage.completion_tokens) == (9, 3 + tokens)


def test_tokens_without_text_of_their_own_are_counted_with_the_character_they_begin() -> None:
    """vLLM sends an event for each token, and the text of a character with the last of its tokens."""
    role, quiet = {"role": "assistant", "content": ""}, {"content": ""}
    deltas = [role, quiet, quiet, {"content": "🌟"}, {"content": "!"}, quiet]
    transcript = transcript_of([event_of(delta, "first") for delta in deltas])
    asked: dict[str, Any] = {"messages": [], "max_tokens": 10}
    assert json.loads(prefill_body(json.dumps(asked).encode(), transcript, "vllm") or b"")["max_tokens"] == 6
    usage = StreamSplicer(transcript, ResumeMethod.PREFILL, "asked").counted(
        Usage(prompt_tokens=24, completion_tokens=6)
    )
    assert (usage.prompt_tokens, usage.completion_tokens) == (20, 10)


def test_usage_that_comes_with_every_event_does_not_run_backwards() -> None:
    """vLLM's `continuous_usage_stats`: an event that the client has already is dropped with its usage."""

    def made(name: str) -> list[bytes]:
        deltas = [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}, {"content": "c"}]
        rows = [{"id": name, "choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        return [
            b"data: %b\n\n" % json.dumps({**row, "usage": {"completion_tokens": at}}).encode()
            for at, row in enumerate(rows)
        ]

    first, second = made("first"), made("second")
    left = joined(StreamSplicer(transcript_of(first[:3]), ResumeMethod.REPLAY, "m"), second)
    assert [json.loads(event[6:])["usage"]["completion_tokens"] for event in [*first[:3], *left]] == [0, 1, 2, 3]
