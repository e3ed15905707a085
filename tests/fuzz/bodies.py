"""Request bodies under fuzzing: `parse_request` and `rewrite` against another decoder."""

import random
from typing import Any

from fleetgate.protocols.clients.openai import output_tokens_max, parse_request, rewrite
from fleetgate.protocols.json_checks import DEPTH_MAX
from fleetgate.protocols.json_members import InvalidBody
from tests.fuzz.mutation import Mutator
from tests.fuzz.strict_json import Members, Number, Reading, Refuse, decode

EXAMPLES = [
    b'{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true}',
    b'{"model": "m", "messages": [{"role": "user", "content": "a \\"model\\": \\u0041\\n"}], "max_tokens": 12}',
    b'{"mod\\u0065l":"m","stream":null,"stream_options":{"include_usage":false,"x":[1,{}]}}',
    b'{"stream_options":{"include_usage":true},"stream":true,"model":"m","temperature":0.5e-3}',
    b'{"model":"m","stream_options":null,"n":-0.0,"big":123456789012345678901234567890,"huge":1e308}',
    b' \r\n\t{ "tools" : [ {"type":"x","function":{"parameters":{"model":{}}}} ] , "model"\n:"m" }\n',
    '{"model":"ünï😀","input":["é","\\ud83d\\ude00","\u2028"],"dimensions":3}'.encode(),
    b'{"prompt":[[1,2,3],[4,5]],"model":"m","stream":false,"logit_bias":{"50256":-100}}',
    b'{"model":"m","x":' + b"[" * 63 + b"]" * 63 + b"}",
    b'{"model":"m","messages":['
    + b",".join([b'{"content":"},{"}'] * 80)
    + b'],"x":'
    + b'{"a":' * 62
    + b"0"
    + b"}" * 63,
    b'{"model":"m","messages":[' + b",".join([b'{"role":"user","content":[{"type":"text","text":"{["}]}'] * 30) + b"]}",
]
TOKENS = [
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b'\\"', b"\\\\", b"\\u006d", b"\\u0000", b"\\ud800", b"\\udc00x",
    b"\\/", b"\\x41", b'"model"', b'"model":"q",', b',"model":"q"', b'"mode\\u006c":"q",', b'"stream":true,',
    b'"stream_options":{},', b'"stream_options":{"include_usage":1},', b'"include_usage":true,', b"null", b"true",
    b"NaN", b"Infinity", b"-Infinity", b"nul", b"1e400", b"-", b"01", b"1.", b".5", b"1e", b"+1", b"0x10", b"9" * 400,
    b"\x00", b"\x1f", b"\n", b"\x7f", b"\x80", b"\xff", b"\xc3", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80",
    b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\x0b", b"\x0c", b"\xc2\xa0", b"//", b"/**/", b"'", b" ", b"\t", b"[" * 60,
    b"]" * 60, b'{"a":' * 63, b"}" * 63, b'{"a":[' * 32, b"]}" * 32, b'"["', b'"]"', b'"}\\"{"', b'"},{"', b"},{",
    b"}, {", b"{},{},{}",
]  # fmt: skip
NAMES = ("m", "meta/llama-3", 'quo"te\\', "ünï😀")


class Bodies:
    """Mutated requests."""

    name = "bodies"

    def make(self, rng: random.Random) -> bytes:
        """An input."""
        return Mutator(rng, TOKENS).damage(rng.choice(EXAMPLES))

    def check(self, data: bytes, rng: random.Random) -> None:
        """Both refuse it, or both read the same."""
        try:
            wanted = Reading(data)
        except Refuse:
            wanted = None
        try:
            info = parse_request(data)
        except InvalidBody as error:
            assert error.message and error.code in ("invalid_json", "invalid_request"), error
            assert wanted is None, f"a valid body is refused: {error.message}"
            return
        assert wanted is not None, "a body is accepted that another decoder refuses"
        read = (info.model, info.stream, info.wants_usage, info.has_stream_options)
        assert read == (wanted.model, wanted.stream, wanted.wants_usage, wanted.has_options), f"read as {read}"
        output_tokens_max(data)
        name, add_usage = rng.choice(NAMES), rng.random() < 0.5 and not info.wants_usage
        written = decode(rewrite(data, info, name, add_usage))
        assert _without_order(written) == _expected(wanted.members, name, add_usage), (
            "rewrote more than model and usage"
        )


def _expected(members: Members, name: str, add_usage: bool) -> Any:
    expected = [(key, name if key == "model" else _with_usage(key, value, add_usage)) for key, value in members]
    if add_usage and not members.all_of("stream_options"):
        expected.append(("stream_options", {"include_usage": True}))
    return sorted(((key, _plain(value)) for key, value in expected), key=repr)


def _with_usage(key: str, value: Any, add_usage: bool) -> Any:
    if key != "stream_options" or not add_usage:
        return value
    return {**dict(value or []), "include_usage": True}  # options are encoded again, so a repeated key remains once


def _without_order(value: Any) -> Any:
    """Members, sorted. Those of the top level stay a list, because a key may be repeated."""
    if isinstance(value, Members):
        return sorted(((key, _plain(inner)) for key, inner in value), key=repr)
    return _plain(value)


def _plain(value: Any) -> Any:
    match value:
        case Members():
            return [(key, _plain(inner)) for key, inner in value]
        case dict():
            return [(key, _plain(inner)) for key, inner in value.items()]
        case list():
            return [_plain(inner) for inner in value]
        case Number():
            return f"number {value}"
    return value


def bombs() -> dict[str, tuple[bytes, bool]]:
    """Bodies that are expensive to check, and whether they are valid."""
    mib = 1024 * 1024

    def filled(piece: bytes, last: bytes = b"0", size: int = 20 * mib - 60) -> bytes:
        return b'{"model":"m","x":[' + piece * (size // len(piece)) + last + b"]}"

    keys = b",".join(b'"%d":0' % number for number in range(1_000_000))
    many = b",".join(b'"%d":0' % number for number in range(60_000))
    tower = b"[" * (DEPTH_MAX - 2) + b"]" * (DEPTH_MAX - 2) + b","
    return {
        "a million keys": (b'{"model":"m",' + keys + b"}", False),
        "a million keys, escaped name": (b'{"mod\\u0065l":"m",' + keys + b"}", False),
        "60,000 keys, escaped name": (b'{"mod\\u0065l":"m",' + many + b"}", False),
        "60,000 options": (b'{"model":"m","stream_options":{' + many + b"}}", False),
        "20 MiB of zeros": (filled(b"0,"), False),
        "20 MiB of brackets": (filled(b"[],"), False),
        "20 MiB of deep brackets": (b"[" * (20 * mib), False),
        "towers as high as may be": (filled(tower, size=190_000), True),
        "far too many towers": (filled(tower, size=1_900_000), False),
        "towers one level too high": (filled(b"[" + tower[:-1] + b"],", size=190_000), False),
        "a text of 20 MiB": (filled(b"a", b'"').replace(b"[", b'["', 1), True),
        "a text of escapes": (filled(b"\\n", b'"').replace(b"[", b'["', 1), True),
        "a text of backslashes": (filled(b"\\\\", b'"').replace(b"[", b'["', 1), True),
        "a text of quotes": (filled(b'\\"', b'"').replace(b"[", b'["', 1), True),
        "a text of commas": (filled(b",", b'"').replace(b"[", b'["', 1), True),
        "a text of models": (filled(b'\\"model\\"', b'"').replace(b"[", b'["', 1), True),
        "many models below": (filled(b'{"model":0},', size=1_000_000), True),
        "a million token ids": (b'{"model":"m","prompt":[' + b"12345," * 999_000 + b"0]}", True),
        "50,000 keys": (b'{"model":"m",' + keys[: keys.index(b',"50000"')] + b"}", True),
        "50,000 keys below": (b'{"model":"m","x":{' + keys[: keys.index(b',"49990"')] + b"}}", True),
        "300,000 objects": (filled(b"{},", b"{}", size=900_000), False),
        "one number of 20 MiB": (filled(b"1", b""), True),  # numbers of such large bodies are not checked
        "many exponents": (filled(b"1e999,", size=5 * mib), True),  # nor are so many values
        "some exponents": (filled(b"0,", b"1e999", size=99_000), False),
        "a large number in a large body": (filled(b"0,", b"1e999", size=990_000), True),
        "long numbers": (filled(b"1" * 4299 + b",", b"0", size=990_000), True),
    }
