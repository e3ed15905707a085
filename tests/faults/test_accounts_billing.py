"""Whom to bill for what: requests that moved, broke off, went on elsewhere, were hedged. FAULTS.md rows 76 and 99.

The engines here tell the same usage whatever they did: 5 prompt and 4 output tokens.
"""

import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fleetgate.control.store import usage
from fleetgate.control.store.database import Database
from fleetgate.control.usage.ingest import UsageIngest
from fleetgate.core.health.hedge_policy import SEEN_MIN
from fleetgate.core.model import Resilience
from fleetgate.ipc.shared_memory import EndpointSignal
from tests.loopback.test_resume import PATIENCE, REPLIES, WORDS, read
from tests.loopback.wall_client import Answer, request
from tests.loopback.wall_rig import Plane, plane
from tests.waiting import wait_for

Row = dict[str, Any]

LEAVERS = int(os.environ.get("FLEETGATE_LEAVERS", "40"))


@pytest.fixture(scope="module")
def two() -> Iterator[Plane]:
    with plane(walls=2, patience=PATIENCE) as made:
        for wall in made.walls:
            wall.replies.update(REPLIES)
        yield made


@pytest.fixture
def patient() -> Iterator[Plane]:
    """An engine that shares its machine with many clients may be slower than others are given time for."""
    with plane() as made:
        made.wall.replies.update(REPLIES)
        yield made


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(tmp_path / "store.db")
    made.migrate()
    yield made
    made.close()


def use(made: Plane, *engines: str, **options: object) -> None:
    made.use(*({"models": {"m": name}} for name in engines), **options)


def ask(made: Plane, cut: int = 10, **fields: Any) -> Answer:
    return made.ask(request("m", stream=True, **{"temperature": 0, "wall": {"cut": cut}, **fields}))


def rows_of(made: Plane, database: Database, request_id: str) -> list[Row]:
    """The request's attempts, in the order in which they began."""
    UsageIngest(made.rig.data_dir, database).take()
    with database.read() as connection:
        found = usage.load_attempts(connection, request_id)
    return sorted(found, key=lambda row: str(row["attempt_id"]))


def short(rows: list[Row]) -> list[tuple[str, str, int, int]]:
    return [
        (str(row["outcome"]), row["deployment"], row["billed_prompt_tokens"], row["billed_output_tokens"])
        for row in rows
    ]


def test_a_request_that_moved_is_billed_where_it_was_answered(two: Plane, database: Database) -> None:
    use(two, "500", "ok")
    answer = two.ask(request("m"))
    rows = rows_of(two, database, answer.headers["x-request-id"])
    assert short(rows) == [("broken", "one", 0, 0), ("ok", "two", 5, 3)]
    assert [row["attempt_id"][-2:] for row in rows] == ["-1", "-2"]
    assert rows[0]["bytes"] == 0 and rows[1]["bytes"] > len(answer.body)


def test_an_answer_that_went_on_elsewhere_is_billed_once_as_a_whole(two: Plane, database: Database) -> None:
    use(two, "rst", "well")
    answer = ask(two, 20, stream_options={"include_usage": True})
    assert answer.whole
    first, second = rows_of(two, database, answer.headers["x-request-id"])
    assert short([first, second]) == [("broken", "one", 0, 0), ("ok", "two", 5, 4)]
    # The first engine worked too, of which only its own events tell: all but the one with the role.
    assert (first["output_tokens"], first["exact"]) == (19, False) and first["prompt_tokens"] > 0
    assert (second["prompt_tokens"], second["output_tokens"], second["exact"]) == (5, 4, True)


@pytest.mark.parametrize("second", ["otherwise", "fin", "500"])
def test_an_answer_that_ends_loudly_is_billed_as_far_as_it_was_read(
    two: Plane, database: Database, second: str
) -> None:
    use(two, "rst", second)
    answer = ask(two, 12)
    said, _ = read(answer.body)
    assert not answer.whole and said == "".join(WORDS[:11])
    rows = rows_of(two, database, answer.headers["x-request-id"])
    assert [row["billed_output_tokens"] for row in rows] == [11] + [0] * (len(rows) - 1), rows
    assert rows[0]["billed_prompt_tokens"] > 0 and rows[0]["outcome"] == "broken" and len(rows) > 1
    assert rows[0]["bytes"] > len(said)


def test_an_answer_that_may_not_go_on_is_billed_as_far_as_it_was_read(two: Plane, database: Database) -> None:
    use(two, "rst", "well", resilience=Resilience(resume="off"))
    answer = ask(two, 7)
    assert not answer.whole
    (row,) = rows_of(two, database, answer.headers["x-request-id"])
    assert (row["outcome"], row["output_tokens"], row["billed_output_tokens"]) == ("broken", 6, 6)


def test_who_leaves_while_it_goes_on_is_billed_for_what_he_read(two: Plane, database: Database) -> None:
    use(two, "rst", "silent")
    with two.client() as client:
        client.send(request("m", stream=True, temperature=0, wall={"cut": 9}))
        request_id = client.read(head_only=True).headers["x-request-id"]
        wait_for(lambda: two.walls[1].active == 1)
    two.wait_idle()
    rows = rows_of(two, database, request_id)
    assert [(row["outcome"], row["billed_output_tokens"]) for row in rows] == [("broken", 8), ("client_gone", 0)]


def test_an_engine_that_was_given_what_another_said_worked_only_for_the_rest(two: Plane, database: Database) -> None:
    two.use({"models": {"m": "rst"}}, {"models": {"m": "well"}, "engine": "vllm"})
    wait_for(lambda: two.rig.board.signal(two.slots[1], EndpointSignal.PREFILL) == 1)
    two.rig.wait_a_look()
    answer = ask(two, 12, temperature=0.7, max_tokens=100)
    assert answer.whole and read(answer.body)[0] == "".join(WORDS)
    first, second = rows_of(two, database, answer.headers["x-request-id"])
    assert (first["outcome"], first["billed_output_tokens"], first["output_tokens"]) == ("broken", 0, 11)
    assert (second["prompt_tokens"], second["output_tokens"]) == (5, 4), "as its engine said"
    # As one answer, whoever said it; of the eleventh the white space at its end was said again.
    assert second["billed_output_tokens"] == 4 + 10


def test_of_two_attempts_beside_each_other_the_quicker_is_billed(two: Plane, database: Database) -> None:
    two.use(
        *({"models": {"m": name}, "concurrency_max": 10} for name in ("slow", "ok")), resilience=Resilience(hedge="all")
    )
    for _ in range(SEEN_MIN):
        assert ask(two, wall={"delay_s": 0.0}).whole
    answer = ask(two, wall={"delay_s": 6.0})
    assert answer.whole and answer.headers["x-fleetgate-deployment"] == "two"
    rows = rows_of(two, database, answer.headers["x-request-id"])
    assert [(row["outcome"], row["deployment"]) for row in rows] == [("hedged", "one"), ("ok", "two")]
    assert rows[0]["billed_prompt_tokens"] == rows[0]["billed_output_tokens"] == 0 < rows[0]["prompt_tokens"]
    assert rows[1]["billed_output_tokens"] == rows[1]["output_tokens"] > 0


def test_a_kept_connection_that_was_closed_has_a_row_of_its_own(two: Plane, database: Database) -> None:
    use(two, "stale")
    ids = [two.ask(request("m")).headers["x-request-id"] for _ in range(2)]
    assert short(rows_of(two, database, ids[0])) == [("ok", "one", 5, 3)]
    rows = rows_of(two, database, ids[1])
    assert short(rows) == [("stale", "one", 0, 0), ("ok", "one", 5, 3)]
    assert [row["attempt_id"] for row in rows] == [f"{ids[1]}-1", f"{ids[1]}-1.2"]


def test_row_99_who_leaves_at_any_moment_is_billed_for_what_came_until_then(patient: Plane, database: Database) -> None:
    """At least for what it read, and for no more than the engine can have said by the time it was stopped.

    `FLEETGATE_LEAVERS=10000` is the long form.
    """
    use(patient, "ok")
    count, pace_s = 400, 0.005

    def leave(seed: int) -> tuple[str, int]:
        events = random.Random(seed).randint(1, 150)
        with patient.client() as client:
            client.send(request("m", stream=True, wall={"count": count, "pace_s": pace_s}))
            request_id = client.read(head_only=True).headers["x-request-id"]
            for _ in range(events):
                client.read_until(b'"content":"')
            client.read_until(b"\n\n")
        return request_id, events

    with ThreadPoolExecutor(8) as pool:
        left = list(pool.map(leave, range(LEAVERS)))
    patient.wait_idle()
    UsageIngest(patient.rig.data_dir, database).take()
    overshoot = []
    for request_id, events in left:
        with database.read() as connection:
            (row,) = usage.load_attempts(connection, request_id)
        assert row["outcome"] == "client_gone" and row["billed_prompt_tokens"] > 0, row
        assert events - 1 <= row["billed_output_tokens"] < count, (events, row)  # the role's event has no text to bill
        assert (row["billed_output_tokens"], row["exact"]) == (row["output_tokens"], False)
        overshoot.append(row["billed_output_tokens"] - events)
    overshoot.sort()
    print(f"{len(left)} left; billed beyond what they read: median {overshoot[len(left) // 2]}, most {overshoot[-1]}")
    assert overshoot[len(overshoot) // 2] <= 0.5 / pace_s, "half of them by less than half a second"


def test_row_71_a_stream_whose_worker_is_killed_is_charged_to_within_a_second_or_two(database: Database) -> None:
    with plane() as one:
        one.use({"models": {"m": "ok"}})
        pace_s, events = 0.02, 200
        with one.client() as client:
            client.send(request("m", stream=True, wall={"count": 2000, "pace_s": pace_s}))
            request_id = client.read(head_only=True).headers["x-request-id"]
            for _ in range(events):
                client.read_until(b'"content":"')
            assert not rows_of(one, database, request_id), "it is not over"
            one.rig.processes[0].kill()
            one.rig.processes[0].wait(10)
            (row,) = rows_of(one, database, request_id)
        assert row["outcome"] == "interrupted" and not row["exact"]
        assert events - 2.5 / pace_s <= row["billed_output_tokens"] == row["output_tokens"] <= 2000
        assert row["billed_prompt_tokens"] > 0
