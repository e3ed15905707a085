"""An engine that gives and takes token ids, as vLLM does; what it says is a function of the ids before it alone.

Some of its tokens are halves of a character. It has no memory of a prompt's bytes: half a character at a prompt's end
is lost, so that whoever goes on from there has to begin one token earlier.
"""

import asyncio
import hashlib
import json
from typing import Any

from tests.loopback.wall import Line, Seen
from tests.loopback.wall_replies import CHUNKED, DONE, EVENT_STREAM, LAST, chunk

WORDS = ("plain ", "é→ ", 'a " quote ', "line\nbreak ", "\\u0041 ", "end", "😀", "token_ids", "[1,2] ", "x")
HALVES = ((b"\xf0\x9f", (b"\x98\x81", b"\x98\x82", b"\xa4\x96")), (b"\xe2\x86", (b"\x92 ", b"\x90 ", b"\x91")))
VOCABULARY = [*(word.encode() for word in WORDS), *(half for begin, ends in HALVES for half in (begin, *ends))]
STARTS = [*range(len(WORDS)), VOCABULARY.index(b"\xf0\x9f"), VOCABULARY.index(b"\xe2\x86")]
END, BEGIN = 98, 99  # the last token of an answer, and of a prompt


def continuation(prefix: list[int], tokens_max: int, length: int) -> list[int]:
    """The tokens that follow on some; an answer has `length` of them and `END`, whoever says which part."""
    made = list(prefix)
    said = prefix.index(BEGIN) + 1
    ends = dict(HALVES)
    while len(made) < len(prefix) + tokens_max and made[-1] != END:
        digest = int.from_bytes(hashlib.sha256(repr(made).encode()).digest()[:4])
        begun = ends.get(VOCABULARY[made[-1]]) if made[-1] < len(VOCABULARY) else None
        if begun is not None:
            made.append(VOCABULARY.index(begun[digest % len(begun)]))
        elif len(made) - said >= length:
            made.append(END)
        else:
            made.append(STARTS[digest % len(STARTS)])
    return made[len(prefix) :]


def texts(prefix: list[int], ids: list[int]) -> list[str]:
    """The text of each token: none of half a character, and none of one whose begin is in the prompt."""
    said, pending = [], b""
    lost = prefix[-1] < len(VOCABULARY) and VOCABULARY[prefix[-1]] in dict(HALVES)
    for one in ids:
        pending += VOCABULARY[one] if one < len(VOCABULARY) else b""
        try:
            said.append(pending.decode() if not lost else "")
            pending = b""
        except UnicodeDecodeError:
            said.append("")
        lost = False
    return said


class TokenEngine:
    """What a wall answers. Shape: its next chat or first completion breaks off after `cut` events, once; 0 for never.

    `tokenizer` makes the prompt's ids differ from those of engines with another one.
    """

    def __init__(self, name: str, tokenizer: int = 0) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.length = 40
        self.cut = 0
        self.together = 1  # tokens of one event
        self.answers = 0

    def prompt_ids(self, asked: dict[str, Any]) -> list[int]:
        """The tokens of a prompt: of a text one for each byte."""
        prompt = asked.get("prompt")
        if isinstance(prompt, list):
            return list(prompt)
        text = prompt if prompt is not None else "".join(f"{m['role']}:{m['content']}\n" for m in asked["messages"])
        return [*(1000 + self.tokenizer + byte for byte in str(text).encode()), BEGIN]

    def events(self, seen: Seen) -> list[bytes]:
        """Its whole answer."""
        asked, chat = seen.ask, "messages" in seen.ask
        self.answers += 1
        kind = "chat.completion.chunk" if chat else "text_completion"
        head = {"id": f"{self.name}-{self.answers}", "object": kind, "created": self.answers, "model": seen.model}

        def made(choices: list[dict[str, Any]], **more: Any) -> bytes:
            return b"data: %b\n\n" % json.dumps({**head, "choices": choices, **more}, separators=(",", ":")).encode()

        prompt, shows = self.prompt_ids(asked), bool(asked.get("return_token_ids"))
        ids = continuation(
            prompt, asked.get("max_tokens") or (1000 if "max_tokens" in asked or chat else 16), self.length
        )
        said, events = texts(prompt, ids), []
        told = {"prompt_token_ids": prompt} if shows else {}
        if chat:
            events.append(
                made([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}], **told)
            )
            told = {}
        for at in range(0, len(ids), self.together):
            text = "".join(said[at : at + self.together])
            choice = {"index": 0, **({"delta": {"content": text}} if chat else {"text": text})}
            last = at + self.together >= len(ids)
            choice["finish_reason"] = None if not last else "stop" if ids[-1] == END else "length"
            events.append(made([{**choice, **({"token_ids": ids[at : at + self.together]} if shows else {}), **told}]))
            told = {}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids), "total_tokens": len(prompt) + len(ids)}
        return [*events, *([made([], usage=usage)] if asked.get("stream_options") else []), DONE]

    async def reply(self, line: Line, seen: Seen) -> None:
        """Answer, or break off."""
        events, cut = self.events(seen), self.cut
        self.cut = 0
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
