"""Journals that end anywhere still make one row for each attempt."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from fleetgate.core.usage_record import (
    INTERRUPTED,
    Entry,
    JournalReplay,
    UsageIntent,
    UsageProgress,
    UsageRow,
    UsageSettlement,
    read_entries,
)


def intent(number: int) -> UsageIntent:
    return UsageIntent(f"r-{number}", 1000 + number, f"key-{number % 3}", "g", "m", "d", "region")


def settlement(number: int) -> UsageSettlement:
    return UsageSettlement(f"r-{number}", 2000 + number, "ok", 10, number, 1, 10, number, 100)


def line(entry: Entry) -> bytes:
    return msgspec.json.encode(entry) + b"\n"


@st.composite
def journals(draw: st.DrawFn) -> list[Entry]:
    """A journal of attempts that overlap, each with its entries in their order, some of them not settled."""
    count = draw(st.integers(0, 12))
    left: list[list[Entry]] = []
    for number in range(count):
        steps = [UsageProgress(f"r-{number}", 10, step) for step in range(draw(st.integers(0, 3)))]
        end = [settlement(number)] if draw(st.booleans()) else []
        left.append([intent(number), *steps, *end])
    made: list[Entry] = []
    while left:
        one = draw(st.sampled_from(left))
        made.append(one.pop(0))
        left = [each for each in left if each]
    return made


def by_hand(entries: list[Entry]) -> dict[str, tuple[str, int]]:
    """What the ledger must say, told without a fold: outcome and output tokens by attempt."""
    rows: dict[str, tuple[str, int]] = {}
    for one in entries:
        match one:
            case UsageIntent():
                rows[one.id] = (INTERRUPTED, 0)
            case UsageProgress() if rows[one.id][0] == INTERRUPTED:
                rows[one.id] = (INTERRUPTED, one.output_tokens)
            case UsageSettlement():
                rows[one.id] = ("ok", one.output_tokens)
            case _:
                pass
    return rows


def told(rows: list[UsageRow]) -> dict[str, tuple[str, int]]:
    assert len({row.attempt_id for row in rows}) == len(rows)
    return {row.attempt_id: (row.outcome, row.output_tokens) for row in rows}


@given(journals(), st.data())
def test_a_journal_that_is_cut_at_any_byte_makes_one_row_of_each_attempt_it_knows(
    entries: list[Entry], data: st.DataObject
) -> None:
    text = b"".join(line(entry) for entry in entries)
    cut = text[: data.draw(st.integers(0, len(text)))]
    pieces = cut.split(b"\n")
    whole = len(pieces) - (not pieces[-1].endswith(b"}"))  # only a line feed may be missing
    found, read, damaged = read_entries(cut + b"\0" * 64, True)
    assert (len(found), damaged) == (whole, int(len(pieces) > whole and pieces[-1] != b""))
    assert read == len(cut) + 64
    fold = JournalReplay()
    rows = [*fold.apply(found), *fold.abandon(9)]
    assert told(rows) == by_hand(entries[:whole])
    assert not fold.open_attempts


@given(journals(), st.lists(st.integers(0, 4000), max_size=6))
def test_reading_while_it_is_written_reads_nothing_twice_and_nothing_half(
    entries: list[Entry], moments: list[int]
) -> None:
    text = b"".join(line(entry) for entry in entries)
    fold, rows, offset = JournalReplay(), list[UsageRow](), 0
    for moment in [*sorted(moments), len(text)]:
        written = text[:moment] + b"\0" * (len(text) + 8 - moment)
        found, read, damaged = read_entries(written[offset:], False)
        assert damaged == 0
        offset += read
        rows += fold.apply(found)
        fold = JournalReplay(fold.open_attempts.values())  # a restart of the reader, from what it kept
    assert offset == len(text)
    assert told([*rows, *fold.abandon(9)]) == by_hand(entries)


@given(journals())
def test_what_is_told_twice_counts_once(entries: list[Entry]) -> None:
    fold = JournalReplay()
    rows = list(fold.apply(entries))
    again = [entry for entry in entries if isinstance(entry, UsageSettlement)]
    assert not list(fold.apply(again))
    assert told([*rows, *fold.abandon(9)]) == by_hand(entries)


@given(journals(), st.integers(0, 2000), st.integers(1, 200))
def test_a_hole_in_a_dead_journal_costs_what_was_in_it_and_no_more(entries: list[Entry], at: int, size: int) -> None:
    text = b"".join(line(entry) for entry in entries)
    holed = text[:at] + b"\0" * len(text[at : at + size]) + text[at + size :]
    found, _, damaged = read_entries(holed, True)
    assert len(found) + damaged >= len(entries) - size
    assert all(entry in entries for entry in found)
