"""Usage: what each attempt cost and what its client is billed, from a journal that a crash may end anywhere.

A worker writes an intent before it sends an attempt, and a settlement when the attempt is over. The replay of a journal
gives one row for each attempt, whatever happened in between: an attempt without a settlement is charged by its last
progress.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

JOURNAL = "journal"  # the directory inside the data directory
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
    """The progress of a stream, written about once a second: what is known of it if its worker dies."""

    id: str
    prompt_tokens: int
    output_tokens: int


class UsageSettlement(msgspec.Struct, frozen=True, tag_field="t", tag="s"):
    """An attempt is over.

    Shape: `exact` is 1 for token counts from the engine, 0 for estimates. `prompt_tokens` and `output_tokens` are the
    engine's work; the billed ones are charged to the client, and only the last attempt of a request has them.
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
    """One attempt in the usage table."""

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
    """An attempt without a settlement, with its last progress."""

    intent: UsageIntent
    progress: UsageProgress | None = None


def read_entries(data: bytes, is_over: bool) -> tuple[list[Entry], int, int]:
    """Read a piece of a journal: its entries, the bytes that need not be read again, and the damaged lines.

    Shape: a journal is filled with zeros up to its file's size. While it is written, the last line may be incomplete.
    If it `is_over`, zeros can also be pages that a crash of the machine lost, and the lines after them count.
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
    """The replay of one worker's journal. Shape: `open_attempts` are the attempts without a settlement, by id."""

    def __init__(self, open_attempts: Iterable[OpenAttempt] = ()) -> None:
        self.open_attempts: dict[str, OpenAttempt] = {attempt.intent.id: attempt for attempt in open_attempts}

    def apply(self, entries: Iterable[Entry]) -> Iterator[UsageRow]:
        """The rows of settled attempts. A settlement without an intent, or a second one, gives no row."""
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
        """The rows of open attempts after the worker died: charged by their last progress."""
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
