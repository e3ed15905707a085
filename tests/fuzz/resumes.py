"""Going on elsewhere under fire: a transcript of one damaged stream, and another that is joined to it."""

import random

from fleetgate.protocols.http1 import Malformed
from fleetgate.protocols.openai import OPERATIONS, InvalidBody, Meaning, read_ask, understand
from fleetgate.protocols.resume import Mismatch, Seam, Transcript, Way, prefill_body, ways_of
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
EXAMPLES = [b"".join(PIECES), b"".join(PIECES[:4]), PIECES[0] + CALL + MORE + PIECES[-3], TEXT * 3 + PIECES[-3]]
ASKS = [
    b'{"model":"m","messages":[{"role":"user","content":"hi"}],"temperature":0,"max_tokens":50,"stream":true}',
    b'{"model":"m","prompt":"hi","temperature":0.0,"max_completion_tokens":9,"n":1,"stream":true}',
    b'{"model":"m","messages":[],"tools":[],"response_format":null,"top_k":1,"modalities":["text"]}',
]
ASK_TOKENS = [
    b'"messages":{},', b'"messages":null,', b'"prompt":[1],', b'"prompt":null,', b'"n":2,', b'"n":1.0,', b'"n":"1",',
    b'"max_tokens":"5",', b'"max_tokens":1e3,', b'"max_tokens":null,', b'"max_tokens":[],', b'"temperature":"0",',
    b'"temperature":1e400,', b'"tools":[{}],', b'"echo":true,', b'"modalities":"text",', b'"logprobs":true,',
    b'"best_of":-1,', b"null", b"{}", b"[]", b'"', b"0", b"-", b"9" * 400, b"1e400", b",", b":", b"\\ud800", b"\xff",
]  # fmt: skip


class Resumes:
    """A request, what its client has read, and another answer to it; each damaged."""

    name = "resumes"

    def make(self, rng: random.Random) -> bytes:
        """An input: the request's JSON and two streams, one behind the other with a NUL between."""
        ask = Mutator(rng, ASK_TOKENS).damage(rng.choice(ASKS))
        mutator = Mutator(rng, TOKENS)
        return b"\x00".join([ask, mutator.damage(rng.choice(EXAMPLES)), mutator.damage(rng.choice(EXAMPLES))])

    def check(self, data: bytes, rng: random.Random) -> None:
        """Nothing but the announced refusals, and what is passed on is JSON that goes on from what was said."""
        ask, said, more = [*data.split(b"\x00", 2), b"", b""][:3]
        try:
            read_ask(ask)
        except InvalidBody:
            ask = rng.choice(ASKS)
        path = b"/v1/completions" if b'"prompt"' in ask else b"/v1/chat/completions"
        ways = ways_of(ask, OPERATIONS[path])
        script = Transcript()
        for event in well_formed(said):
            script.keep(event)
        if not script.runs or not script.whole:
            return
        for way in ways:
            if way is Way.PREFILL:
                body = prefill_body(ask, script, rng.choice(("vllm", "llamacpp")))
                assert body is None or isinstance(strict_json.decode(body), strict_json.Members)
            self._join(script, way, more)

    def _join(self, script: Transcript, way: Way, more: bytes) -> None:
        before = script.runs
        seam, joined = Seam(script, way, "m"), Transcript()
        try:
            for event in well_formed(more):
                data = data_of(event)
                if understand(event)[0] in (Meaning.COMMENT, Meaning.DONE, Meaning.ERROR) or data is None:
                    continue
                left = seam.take(data)
                if left is not None:
                    assert strict_json.decode(data_of(left) or b"") is not None
                    joined.keep(left)
        except (Mismatch, Malformed):
            return
        if way is Way.REPLAY and seam.caught_up and joined.whole:
            replayed = Transcript()
            for event in well_formed(more):
                replayed.keep(event)
            if replayed.whole:
                assert _flat(before + joined.runs) == _flat(replayed.runs), "the seam does not fit"


def well_formed(stream: bytes) -> list[bytes]:
    """The events of a stream that a relay would pass on."""
    try:
        events = Events().feed(stream)
    except EventTooLong:
        return []
    texts = [event.decode(errors="replace").encode() for event in events]
    return [text for text in texts if understand(text)[0] not in (Meaning.MALFORMED, Meaning.ERROR)]


def _flat(runs: list[tuple[str, str]]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for channel, text in runs:
        if channel.endswith(".name"):
            continue  # some engines say it with every piece, and once is enough
        flat[channel] = flat.get(channel, "") + text
    return flat
