"""The oracle: joins what clients, the gateway's access log and the walls wrote down. A row without a partner fails.

A request has a mark of its own in its prompt, which walls see, and an id in its answer, which the access log has.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

T = TypeVar("T")
End = Literal["exact", "told", "refused", "wrong", "silent", "cut", "lost"]


class Asked(msgspec.Struct, frozen=True):
    """What a client saw of one request. Shape: `request_id` is empty and `status` 0 where no head came."""

    mark: str
    request_id: str
    status: int
    attempts: int
    end: End
    code: str = ""  # of the error that it was refused with


class Logged(msgspec.Struct, frozen=True):
    """One line of the access log."""

    request_id: str
    status: int
    outcome: str
    attempts: int


class Got(msgspec.Struct, frozen=True):
    """One request as a wall got it. Shape: `serial` is its place in the log of that wall."""

    wall: int
    serial: int
    mark: str


def problems(asked: Sequence[Asked], logged: Sequence[Logged], got: Sequence[Got], harmed: int) -> list[str]:
    """What does not fit together, one sentence each. Shape: `harmed` is how many connections were ended on the way."""
    found = [f"mark {mark} was used {count} times" for mark, count in _more(row.mark for row in asked)]
    found += [f"id {known} was given {count} times" for known, count in _more(row.request_id for row in asked)]
    found += [f"id {known} has {count} lines in the log" for known, count in _more(row.request_id for row in logged)]
    found += [f"wall has {row} twice" for row, _ in _more((row.wall, row.serial) for row in got)]
    lines = {row.request_id: row for row in logged}
    reached = Counter(row.mark for row in got)
    missing = 0
    for row in asked:
        line = lines.pop(row.request_id, None)
        if line is None:
            found.append(
                f"{row.mark}: its client has a {row.status} ({row.end}), the log has no line {row.request_id!r}"
            )
            continue
        found += [f"{row.mark}: {problem}" for problem in _pair(row, line, reached[row.mark])]
        missing += max(0, line.attempts - reached.pop(row.mark, 0))
    found += [f"the log has {known}, and no client asked for it" for known in lines]
    found += [f"a wall got {mark!r} {count} times, and no client asked for it" for mark, count in reached.items()]
    if missing > harmed:
        found.append(f"{missing} attempts did not reach a wall, but only {harmed} connections were harmed")
    return found


def _pair(row: Asked, line: Logged, reached: int) -> Iterable[str]:
    if row.status != line.status:
        yield f"its client has status {row.status}, the log {line.status}"
    if row.attempts > line.attempts:
        yield f"its client was told of {row.attempts} attempts, the log of {line.attempts}"
    if reached > line.attempts:
        yield f"walls got it {reached} times, the log has {line.attempts} attempts"
    if row.end in ("exact", "told") and not reached:
        yield "it has an answer that no wall gave"
    if (row.end == "exact") != (line.outcome == "ok"):
        yield f"its client calls the end {row.end}, the log {line.outcome}"


def _more(rows: Iterable[T]) -> list[tuple[T, int]]:
    return [(row, count) for row, count in Counter(rows).items() if count > 1]


def read_log(file: Path) -> list[Logged]:
    """The requests in an access log; refused keys and such have lines of another kind."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [Logged(row["id"], row["status"], row["outcome"], row["attempts"]) for row in rows if "id" in row]
