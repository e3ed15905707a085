"""Regions that fail by a random schedule under load, with real processes: nothing is lost, and the books agree.

One seed, one schedule. `make chaos` runs more of them; FLEETGATE_SEED=N repeats one.
"""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.crowd import RETRIES, Crowd, engine, got, out_of_order
from tests.faults.oracle import Asked, Logged, problems, read_log
from tests.faults.weather import Weather, play, schedule
from tests.loopback.up_rig import Up, deployment, gateway
from tests.loopback.wall import Wall
from tests.waiting import wait_for

SEED = int(os.environ.get("FLEETGATE_SEED", "1"))
AGAIN = f"seed {SEED}; again with FLEETGATE_SEED={SEED} pytest -s tests/faults/test_random_schedule.py"
RATE = 100.0
SCHEDULE_S = float(os.environ.get("FLEETGATE_SCHEDULE_S", "10"))
OUTAGE_S = 6.0
TOTAL_S = 3.0
NAMES = ("one", "two", "three")

pytestmark = [pytest.mark.alone, pytest.mark.timeout(300 + int(SCHEDULE_S))]


class Fleet(NamedTuple):
    """Three regions with weather before them, and Fleetgate before that."""

    up: Up
    walls: list[Wall]
    weather: list[Weather]

    def log(self, asked: list[Asked]) -> list[Logged]:
        """The lines of the access log about these requests and about any that no client of these tests asked for."""
        file = self.up.folder / "access.log"
        wait_for(lambda: {row.request_id for row in asked} <= {row.request_id for row in read_log(file)} | {""})
        return read_log(file)


@pytest.fixture
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder: Path = tmp_path_factory.mktemp("schedule")
    with ExitStack() as stack:
        walls = [stack.enter_context(Wall({"ok": engine})) for _ in NAMES]
        weather = [stack.enter_context(Weather(wall.port, SEED)) for wall in walls]
        documents = [
            deployment(name, f"http://127.0.0.1:{each.port}/v1", engine="openai")
            for name, each in zip(NAMES, weather, strict=True)
        ]
        documents.append(gateway("chat", *NAMES, strategy="capacity_round_robin"))
        flags = ("--auth", "none", "--access-log", str(folder / "access.log"))
        yield Fleet(stack.enter_context(Up(folder, documents, *flags)), walls, weather)


def judge(fleet: Fleet, crowd: Crowd, before: set[str], harmed: int) -> list[Logged]:
    """The oracle over what one test asked; its lines of the log."""
    lines = [row for row in fleet.log(crowd.asked) if row.request_id not in before]
    found = problems(crowd.asked, lines, got(fleet.walls), harmed)
    assert not found, f"{AGAIN}: {len(found)} problems, the first: {found[:5]}"
    return lines


def refused(crowd: Crowd) -> Counter[tuple[str, str, int, int]]:
    """What did not end exact: end, code, status, attempts."""
    rows = [row for row in crowd.asked if row.end not in ("exact", "told")]
    return Counter((row.end, row.code, row.status, row.attempts) for row in rows)


def begin(fleet: Fleet, name: str) -> tuple[Crowd, set[str]]:
    """New books, once every region gets requests; the ids that are in the log already."""

    def warm() -> bool:
        asyncio.run(Crowd(fleet.up.port, "warms-up", SEED).run(RATE, 0.3))
        return all(wall.seen for wall in fleet.walls)

    wait_for(warm)
    wait_for(lambda: all(wall.active == 0 for wall in fleet.walls))
    time.sleep(0.2)  # the last lines of the log
    for wall in fleet.walls:
        wall.forget()
    return Crowd(fleet.up.port, name, SEED), {row.request_id for row in read_log(fleet.up.folder / "access.log")}


def test_nothing_is_lost_whatever_the_weather(fleet: Fleet) -> None:
    crowd, before = begin(fleet, "schedule")
    spells = schedule(SEED, len(NAMES), SCHEDULE_S)
    harmed = sum(each.harmed for each in fleet.weather)

    async def run() -> None:
        await asyncio.gather(crowd.run(RATE, SCHEDULE_S), play(spells, fleet.weather))

    asyncio.run(run())
    ends = Counter(row.end for row in crowd.asked)
    lines = judge(fleet, crowd, before, sum(each.harmed for each in fleet.weather) - harmed)
    moved = sum(row.attempts > 1 for row in lines)
    print(f"{AGAIN}\n{len(spells)} faults, {len(lines)} requests, {moved} of them moved or resumed: {dict(ends)}")
    assert not refused(crowd), f"{AGAIN}: {refused(crowd)}"
    assert moved, f"{AGAIN}: no fault met a request"


def test_a_region_that_stays_away_costs_few_attempts(fleet: Fleet) -> None:
    crowd, before = begin(fleet, "outage")
    fleet.weather[0].become("refuse")
    try:
        asyncio.run(crowd.run(RATE, OUTAGE_S))
    finally:
        fleet.weather[0].become("fair")
    lines = judge(fleet, crowd, before, 10**9)
    attempts = sum(row.attempts for row in lines) / len(lines)
    print(f"{AGAIN}\n{attempts:.3f} attempts a request")
    assert not refused(crowd), f"{AGAIN}: {refused(crowd)}"
    assert attempts <= 1.05, f"{AGAIN}: {attempts:.3f} attempts a request"


def test_row_61_nothing_works_and_engines_see_no_more_than_was_asked(fleet: Fleet) -> None:
    crowd, before = begin(fleet, "total")
    for wall in fleet.walls:
        wall.replies["ok"] = out_of_order
    try:
        offered = asyncio.run(crowd.run(RATE, TOTAL_S, RETRIES))
    finally:
        for wall in fleet.walls:
            wall.replies["ok"] = engine
    judge(fleet, crowd, before, 10**9)
    reached = sum(len(wall.seen) for wall in fleet.walls)
    print(f"{AGAIN}\n{reached} requests at the engines for {offered} offered and {len(crowd.asked)} sent")
    assert {row.end for row in crowd.asked} == {"refused"}, AGAIN
    assert reached <= 1.1 * offered, f"{AGAIN}: {reached} for {offered}"
