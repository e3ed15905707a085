"""Accounts: what each attempt cost and what its client is billed, from a journal that crashes may end anywhere.

A worker writes an intent before it sends an attempt and a settlement when the attempt is over. Folding a journal gives
one row for each attempt, whatever happened in between: FAULTS.md section 6, "Accounting model".
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

JOURNAL = "journal"  # the directory inside of the data directory, for those who write it and who read it
INTERRUPTED = "interrupted"  # the worker died before it could settle


class UsageIntent(msgspec.Struct, frozen=True, tag_field="t", tag="i"):
    """An attempt is about to be sent. Shape: `id` is the request's, `-` and the attempt's number.

    Units: `at_ms` milliseconds since the epoch.
    """

    id: str
    at_ms: int
    key: str
    gateway: str
    model: str
    deployment: str
    region: str


class UsageProgress(msgspec.Struct, frozen=True, tag_field="t", tag="p"):
    """How far a stream is, about once a second: all that is known of it should its worker die."""

    id: str
    prompt_tokens: int
    output_tokens: int


class UsageSettlement(msgspec.Struct, frozen=True, tag_field="t", tag="s"):
    """An attempt is over.

    Shape: `exact` says that the engine told the tokens, 0 that they are estimated. The tokens are what the engine
    worked; the billed ones are what the client is charged, which of all attempts of a request only the last one has.
    """

    id: str
    at_ms: int
    outcome: str
    prompt_tokens: int
    output_tokens: int
    exact: int
    billed_prompt_tokens: int
    billed_output_tokens: int
    bytes: int


Entry = UsageIntent | UsageProgress | UsageSettlement
_decode = msgspec.json.Decoder(Entry).decode


class UsageRow(NamedTuple):
    """One attempt in the usage book."""

    attempt_id: str
    began_ms: int
    ended_ms: int
    key: str
    gateway: str
    model: str
    deployment: str
    region: str
    outcome: str
    prompt_tokens: int
    output_tokens: int
    exact: int
    billed_prompt_tokens: int
    billed_output_tokens: int
    bytes: int


class OpenAttempt(NamedTuple):
    """An attempt that is not settled yet, with what was last heard of it."""

    intent: UsageIntent
    progress: UsageProgress | None = None


def read_entries(data: bytes, is_over: bool) -> tuple[list[Entry], int, int]:
    """What a piece of a journal says: entries, how many bytes of it are read for good, how many lines are damaged.

    Shape: a journal ends in zeros up to its file's size. Its writer may be in the middle of a line, unless it
    `is_over`: then zeros may also stand where a crash of the machine lost a page, and what follows them counts.
    Cost: 1 µs an entry.
    """
    if is_over:
        lines, read = data.replace(b"\0", b"\n").split(b"\n"), len(data)
    else:
        end = data.find(b"\0")
        read = data.rfind(b"\n", 0, end if end >= 0 else len(data)) + 1
        lines = data[:read].split(b"\n")
    entries: list[Entry] = []
    damaged = 0
    for line in lines:
        if not line:
            continue
        try:
            entries.append(_decode(line))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            damaged += 1
    return entries, read, damaged


class JournalReplay:
    """One worker's journal, entry by entry. Shape: `open` are the attempts that are not settled, by id."""

    def __init__(self, known: Iterable[OpenAttempt] = ()) -> None:
        self.open_attempts: dict[str, OpenAttempt] = {one.intent.id: one for one in known}

    def apply(self, entries: Iterable[Entry]) -> Iterator[UsageRow]:
        """The rows of what was settled. A settlement without an intent, or a second one, makes none."""
        for entry in entries:
            match entry:
                case UsageIntent():
                    self.open_attempts.setdefault(entry.id, OpenAttempt(entry))
                case UsageProgress():
                    known = self.open_attempts.get(entry.id)
                    if known is not None:
                        self.open_attempts[entry.id] = OpenAttempt(known.intent, entry)
                case UsageSettlement():
                    known = self.open_attempts.pop(entry.id, None)
                    if known is not None:
                        yield _row(known.intent, entry)

    def abandon(self, now_ms: int) -> Iterator[UsageRow]:
        """The worker is dead: what it left open is charged as far as it is known to have come."""
        for intent, progress in self.open_attempts.values():
            prompt, output = (progress.prompt_tokens, progress.output_tokens) if progress is not None else (0, 0)
            yield _row(
                intent,
                UsageSettlement(intent.id, now_ms, INTERRUPTED, prompt, output, 0, prompt, output, 0),
            )
        self.open_attempts.clear()


def _row(intent: UsageIntent, end: UsageSettlement) -> UsageRow:
    return UsageRow(
        attempt_id=intent.id,
        began_ms=intent.at_ms,
        ended_ms=end.at_ms,
        key=intent.key,
        gateway=intent.gateway,
        model=intent.model,
        deployment=intent.deployment,
        region=intent.region,
        outcome=end.outcome,
        prompt_tokens=end.prompt_tokens,
        output_tokens=end.output_tokens,
        exact=end.exact,
        billed_prompt_tokens=end.billed_prompt_tokens,
        billed_output_tokens=end.billed_output_tokens,
        bytes=end.bytes,
    )
