"""Streams cut at random bytes by RST, FIN or silence: none looks whole without being whole, and greedy ones are.

`make chaos` does ten thousand.
"""

import os
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from fleetgate.core.model import Deployment
from tests.faults.chaos import Chaos, cuts
from tests.loopback.test_resume import PATIENCE, REPLIES, WORDS, read
from tests.loopback.wall_client import ask, request
from tests.loopback.wall_replies import DONE
from tests.loopback.wall_rig import Plane, plane

CUTS = int(os.environ.get("FLEETGATE_CUTS", "300"))
SEED = int(os.environ.get("FLEETGATE_SEED", "1"))
ANSWER_BYTES = 9000
CLIENTS = 16
QUICK = {"fleetgate.core.health.timeouts.FIRST_UNKNOWN_S": 2.0}  # what is cut in its head is a silent engine
# A breaker would soon leave nothing to cut.
_MOVES = "fleetgate.core.health.circuit_breaker.TRANSITIONS"
NO_BREAKER: dict[str, float | str] = {_MOVES: f"{{move: to._replace(in_a_row=10**9) for move, to in {_MOVES}.items()}}"}


@pytest.fixture(scope="module")
def two() -> Iterator[Plane]:
    with plane(workers=2, walls=2, patience={**PATIENCE, **NO_BREAKER, **QUICK}) as made:
        for wall in made.walls:
            wall.replies.update(REPLIES)
        yield made


def judge(port: int, number: int) -> str:
    """One stream, and what became of it."""
    greedy = number % 2 == 0
    answer = ask(port, request("m", stream=True, temperature=0 if greedy else 0.7, wall={"pace_s": 0}))
    said, events = read(answer.body)
    kind = "greedy" if greedy else "sampled"
    if answer.status != 200:
        return f"{kind} refused"
    if not "".join(WORDS).startswith(said):
        return f"{kind} wrong"
    if answer.whole and answer.body.endswith(DONE):
        return f"{kind} whole" if said == "".join(WORDS) else f"{kind} SILENT"
    return f"{kind} told" if events and "error" in events[-1] else f"{kind} cut without a word"


@pytest.mark.alone
@pytest.mark.timeout(300 + CUTS // 4)
def test_row_11_no_cut_is_silent_and_greedy_answers_are_whole(two: Plane) -> None:
    with Chaos(two.walls[0].port) as chaos:
        one, other = two.deployments({"models": {"m": "well"}}, {"models": {"m": "well"}})
        two.publish([_at(one, chaos.port), other])
        chaos.cuts = cuts(random.Random(SEED), CUTS, ANSWER_BYTES)
        found: Counter[str] = Counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            asked = 0
            while chaos.cuts and asked < 20 * CUTS:
                found.update(pool.map(lambda number: judge(two.port, number), range(asked, asked + 100)))
                asked += 100
    print(f"seed {SEED}: {len(chaos.done)} cuts in {asked} streams: {dict(found)}")
    assert set(found) <= {"greedy whole", "sampled whole", "sampled told"}, f"seed {SEED}: {dict(found)}"
    assert found["sampled told"], "some were cut where nobody could go on"
    # A few wait on connections that were kept and not used again.
    assert len(chaos.done) >= 0.9 * CUTS, f"seed {SEED}: only {len(chaos.done)} cuts"
    two.wait_idle()


def _at(deployment: Deployment, port: int) -> Deployment:
    """The same Deployment behind another port."""
    endpoint = msgspec.structs.replace(deployment.endpoints[0], port=port)
    return msgspec.structs.replace(deployment, endpoints=(endpoint,))
