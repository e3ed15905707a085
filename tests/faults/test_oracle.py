"""The oracle finds every row that is missing, doubled or changed."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from tests.faults.oracle import Asked, Got, Logged, problems


class Books(NamedTuple):
    """Three ledgers that agree."""

    asked: list[Asked]
    logged: list[Logged]
    got: list[Got]
    harmed: int

    def problems(self) -> list[str]:
        """What the oracle says."""
        return problems(self.asked, self.logged, self.got, self.harmed)


@st.composite
def books(draw: st.DrawFn) -> Books:
    made = Books([], [], [], 0)
    harmed = 0
    for number in range(draw(st.integers(1, 8))):
        reached = draw(st.integers(1, 3))
        lost = draw(st.integers(0, 2))
        harmed += lost
        attempts = reached + lost
        made.asked.append(Asked(f"m{number}", f"id{number}", 200, draw(st.integers(1, attempts)), "exact"))
        made.logged.append(Logged(f"id{number}", 200, "ok", attempts))
        for _ in range(reached):
            made.got.append(Got(draw(st.integers(0, 2)), len(made.got), f"m{number}"))
    return made._replace(harmed=harmed)


@given(books())
def test_books_that_agree_have_no_problems(made: Books) -> None:
    assert made.problems() == []


@given(books(), st.sampled_from(["asked", "logged", "got"]), st.sampled_from(["drop", "double"]), st.data())
def test_a_row_without_a_partner_is_found(made: Books, ledger: str, what: str, data: st.DataObject) -> None:
    rows: list[object] = getattr(made, ledger)
    at = data.draw(st.integers(0, len(rows) - 1))
    if what == "drop":
        del rows[at]
    else:
        rows.insert(data.draw(st.integers(0, len(rows))), rows[at])
    assert made.problems()


CHANGES: Sequence[tuple[str, dict[str, object]]] = (
    ("asked", {"status": 503}),
    ("asked", {"end": "told"}),
    ("asked", {"request_id": ""}),
    ("asked", {"attempts": 9}),
    ("logged", {"outcome": "interrupted"}),
    ("logged", {"attempts": 0}),
    ("logged", {"attempts": 9}),
    ("got", {"mark": "nobody"}),
)


@given(books(), st.sampled_from(CHANGES), st.data())
def test_a_changed_row_is_found(made: Books, change: tuple[str, dict[str, object]], data: st.DataObject) -> None:
    ledger, fields = change
    rows = getattr(made, ledger)
    at = data.draw(st.integers(0, len(rows) - 1))
    rows[at] = msgspec.structs.replace(rows[at], **fields)
    assert made.problems()
