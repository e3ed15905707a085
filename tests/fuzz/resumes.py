"""Resuming under fuzzing: a transcript of one damaged stream, and another stream that is joined to it."""

import random

from fleetgate.protocols.clients.openai import OPERATIONS, classify_event, parse_request
from fleetgate.protocols.clients.openai_resume import resume_methods
from fleetgate.protocols.http1 import Malformed
from fleetgate.protocols.json_members import InvalidBody
from fleetgate.protocols.messages import EventMeaning, ResumeMethod
from fleetgate.protocols.resume.prefill import prefill_body
from fleetgate.protocols.resume.responses import ResponseSplicer, ResponseTranscript, response_resume_methods
from fleetgate.protocols.resume.splice import Mismatch, StreamSplicer
from fleetgate.protocols.resume.token_ids import TokenSplicer, tokens_body
from fleetgate.protocols.resume.transcript import Transcript
from fleetgate.protocols.sse import Events, EventTooLong, data_of
from tests.fuzz import strict_json
from tests.fuzz.mutation import Mutator
from tests.fuzz.streams import PIECES, TOKENS

CALL = (
    b'data: {"id":"w","choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id":"c","type":"function","function":'
    b'{"name":"f","arguments":"{\\"a\\""}}]},"finish_reason":null}]}\n\n'
)
MORE = (
    b'data: {"id":"w","choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":":1}"}}]}}]}\n\n'
)
TEXT = b'data: {"id":"w","choices":[{"index":0,"text":"abc","finish_reason":null}],"usage":null}\n\n'
IDS = (
    b'data: {"id":"w","choices":[{"index":0,"delta":{"role":"assistant","content":""}}],"prompt_token_ids":[7,8]}\n\n'
    b'data: {"id":"w","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null,"token_ids":[1]}]}\n\n'
    b'data: {"id":"w","choices":[{"index":0,"delta":{"content":""},"finish_reason":null,"token_ids":[2]}]}\n\n'
)
CONTINUED = (
    b'data: {"id":"v","choices":[{"index":0,"text":"","token_ids":[2],"prompt_token_ids":[7,8,1]}]}\n\n'
    b'data: {"id":"v","choices":[{"index":0,"text":"b","token_ids":[3],"finish_reason":"stop"}]}\n\n'
)
RESPONSE = b"".join(
    b"event: x\ndata: %b\n\n" % data
    for data in (
        b'{"type":"response.created","sequence_number":0,"response":{"id":"r","created_at":1,"model":"m"}}',
        b'{"type":"response.output_item.added","sequence_number":1,"output_index":0,"item":{"id":"i","type":"message"}}',
        b'{"type":"response.output_text.delta","sequence_number":2,"output_index":0,"item_id":"i","delta":"ab"}',
        b'{"type":"response.output_text.delta","sequence_number":3,"output_index":0,"item_id":"i","delta":"cd"}',
        b'{"type":"response.output_text.done","sequence_number":4,"output_index":0,"item_id":"i","text":"abcd"}',
        b'{"type":"response.completed","response":{"id":"r","output":[{"id":"i","type":"message"}],"model":"m"}}',
    )
)
EXAMPLES = [
    b"".join(PIECES),
    b"".join(PIECES[:4]),
    PIECES[0] + CALL + MORE + PIECES[-3],
    TEXT * 3 + PIECES[-3],
    IDS,
    CONTINUED,
    RESPONSE,
    RESPONSE[: RESPONSE.find(b"event: x", len(RESPONSE) // 2)],
    RESPONSE[: RESPONSE.rfind(b"event: x")],
]
REQUESTS = [
    b'{"model":"m","messages":[{"role":"user","content":"hi"}],"temperature":0,"max_tokens":50,"stream":true}',
    b'{"model":"m","prompt":"hi","temperature":0.0,"max_completion_tokens":9,"n":1,"stream":true}',
    b'{"model":"m","messages":[],"tools":[],"response_format":null,"top_k":1,"modalities":["text"]}',
    b'{"model":"m","messages":[],"temperature":0.7,"max_tokens":50,"return_token_ids":true,"stream":true}',
    b'{"model":"m","input":"hi","temperature":0,"tools":[{"type":"function"}],"stream":true}',
]
REQUEST_TOKENS = [
    b'"messages":{},', b'"messages":null,', b'"prompt":[1],', b'"prompt":null,', b'"n":2,', b'"n":1.0,', b'"n":"1",',
    b'"max_tokens":"5",', b'"max_tokens":1e3,', b'"max_tokens":null,', b'"max_tokens":[],', b'"temperature":"0",',
    b'"temperature":1e400,', b'"tools":[{}],', b'"echo":true,', b'"modalities":"text",', b'"logprobs":true,',
    b'"best_of":-1,', b"null", b"{}", b"[]", b'"', b"0", b"-", b"9" * 400, b"1e400", b",", b":", b"\\ud800", b"\xff",
]  # fmt: skip


class Resumes:
    """A request, what its client has received, and another response to it; each damaged."""

    name = "resumes"

    def make(self, rng: random.Random) -> bytes:
        """An input: the request's JSON and two streams, separated by NUL."""
        request = Mutator(rng, REQUEST_TOKENS).damage(rng.choice(REQUESTS))
        mutator = Mutator(rng, TOKENS)
        return b"\x00".join([request, mutator.damage(rng.choice(EXAMPLES)), mutator.damage(rng.choice(EXAMPLES))])

    def check(self, data: bytes, rng: random.Random) -> None:
        """Only the documented errors are raised, and what is passed on is JSON that continues the first response."""
        request, first, second = [*data.split(b"\x00", 2), b"", b""][:3]
        try:
            parse_request(request)
        except InvalidBody:
            request = rng.choice(REQUESTS)
        if b'"input"' in request:
            self._check_response(request, first, second)
            return
        path = b"/v1/completions" if b'"prompt"' in request else b"/v1/chat/completions"
        methods = resume_methods(request, OPERATIONS[path])
        transcript = Transcript(7)
        for event in well_formed(first):
            transcript.keep(event)
        if not transcript.runs or not transcript.whole:
            return
        for method in methods:
            if method is ResumeMethod.PREFILL:
                body = prefill_body(request, transcript, rng.choice(("vllm", "llamacpp")))
                assert body is None or isinstance(strict_json.decode(body), strict_json.Members)
            splicer = StreamSplicer(transcript, method, "m")
            if method is ResumeMethod.TOKENS:
                body = tokens_body(request, transcript)
                if body is None:
                    continue
                assert isinstance(strict_json.decode(body), strict_json.Members)
                splicer = TokenSplicer(transcript, "m", OPERATIONS[path])
            self._join(transcript, method, splicer, second)

    def _check_response(self, request: bytes, first: bytes, second: bytes) -> None:
        transcript = ResponseTranscript()
        for event in well_formed(first):
            transcript.keep(event)
        if transcript.runs and transcript.whole and response_resume_methods(request):
            self._join(transcript, ResumeMethod.REPLAY, ResponseSplicer(transcript, "m"), second)

    def _join(self, transcript: Transcript, method: ResumeMethod, splicer: StreamSplicer, second: bytes) -> None:
        before = transcript.runs
        joined = type(transcript)()
        try:
            for event in well_formed(second):
                data = data_of(event)
                if (
                    classify_event(event)[0] in (EventMeaning.COMMENT, EventMeaning.DONE, EventMeaning.ERROR)
                    or data is None
                ):
                    continue
                left = splicer.take(data)
                if left is not None:
                    assert strict_json.decode(data_of(left) or b"") is not None
                    joined.keep(left)
        except (Mismatch, Malformed):
            return
        joined.digest()
        if method is ResumeMethod.REPLAY and splicer.caught_up and joined.whole:
            replayed = type(transcript)()
            for event in well_formed(second):
                replayed.keep(event)
            replayed.digest()
            if replayed.whole:
                assert _flat(before + joined.runs) == _flat(replayed.runs), "the splicer does not fit"


def well_formed(stream: bytes) -> list[bytes]:
    """The events of a stream that a relay would pass on."""
    try:
        events = Events().feed(stream)
    except EventTooLong:
        return []
    texts = [event.decode(errors="replace").encode() for event in events]
    return [text for text in texts if classify_event(text)[0] not in (EventMeaning.MALFORMED, EventMeaning.ERROR)]


def _flat(runs: list[tuple[str, str]]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for channel, text in runs:
        if channel.endswith(".name"):
            continue  # some engines repeat it in every piece; once is enough
        flat[channel] = flat.get(channel, "") + text
    return flat
