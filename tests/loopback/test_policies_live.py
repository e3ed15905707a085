"""Policies in the request path: what they require holds on every attempt, what they prefer comes first."""

import threading
from collections.abc import Iterator

import pytest

from fleetgate.core.model import Admission, Policy
from fleetgate.ipc.event_spool import EventSpool
from tests.loopback.wall_client import request
from tests.loopback.wall_rig import Plane, plane
from tests.waiting import wait_for

EU = "deployment.labels.jurisdiction == 'eu'"


@pytest.fixture(scope="module")
def two() -> Iterator[Plane]:
    with plane(walls=2) as made:
        yield made


def policies(*made: Policy) -> dict[str, object]:
    return {"policies": made}


def served_by(plane_: Plane, data: bytes) -> str:
    answer = plane_.ask(data)
    assert answer.status == 200, answer.body
    return answer.headers["x-fleetgate-deployment"]


def test_what_a_policy_requires_is_kept_to_also_when_its_only_deployment_fails(two: Plane) -> None:
    rule = Policy(name="eu-stays", when="request.headers['x-where'] == 'eu'", require=EU)
    two.use({}, {"labels": {"jurisdiction": "eu"}}, **policies(rule))
    assert served_by(two, request()) == "one"
    assert served_by(two, request(headers=["x-where: eu"])) == "two"
    answer = two.ask(request("500", headers=["x-where: eu"]))
    assert answer.status == 502, "a retry may not leave what policies allow"
    assert not two.seen(0)[1:], "the other Deployment was never asked"


def test_nobody_left_is_403_and_names_the_policy(two: Plane) -> None:
    two.use({}, {}, **policies(Policy(name="eu-stays", require=EU)))
    answer = two.ask(request())
    assert (answer.status, answer.code) == (403, "policy_denied") and b"eu-stays" in answer.body


def test_what_a_policy_prefers_comes_first_and_the_others_remain(two: Plane) -> None:
    rule = Policy(name="long", when="request.body.service_tier == 'flex'", prefer=("two",))
    two.use({}, {}, **policies(rule))
    assert served_by(two, request()) == "one"
    assert served_by(two, request(service_tier="flex")) == "two"
    two.use({}, {"models": {"m": "500"}}, **policies(rule))
    assert served_by(two, request(service_tier="flex")) == "one"


def test_a_policy_that_fails_closes_what_it_requires_and_tells(two: Plane) -> None:
    rule = Policy(name="odd", require="int(request.headers['x-number']) > 3")
    two.use({}, {}, **policies(rule))
    assert served_by(two, request(headers=["x-number: 5"])) == "one"
    answer = two.ask(request(headers=["x-number: five"]))
    assert (answer.status, answer.code) == (403, "policy_denied")
    told = EventSpool(two.rig.data_dir).take()
    assert any("odd" in happened.message and happened.kind == "Gateway" for happened in told)
    assert not any("five" in happened.message for happened in told), "nothing a client sent is told"


def test_the_priority_decides_who_waits_behind_whom_and_who_is_shed(two: Plane) -> None:
    """One place, a full queue of sheddable requests: a critical one takes the place of the last of them."""
    rule = Policy(name="urgent", when="request.headers['x-urgent'] == 'yes'", priority="critical")
    rest = Policy(name="rest", when="request.headers['x-urgent'] != 'yes'", priority="sheddable")
    one = {"concurrency_max": 1, "concurrency_written": True, "models": {"held": "held"}}
    two.use(one, admission=Admission(queue_max=2, queue_timeout_s=20.0), **policies(rule, rest))
    two.wall.hold()
    order: list[tuple[str, int]] = []

    def ask(name: str, *headers: str) -> threading.Thread:
        def run() -> None:
            order.append((name, two.ask(request("held", headers=headers, note=name)).status))

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    threads = [ask("first")]
    wait_for(lambda: two.in_flight() == 1)
    threads += [ask("second")]
    wait_for(lambda: two.rig.board.waiting_total(0) == 1)
    threads += [ask("third")]
    wait_for(lambda: two.rig.board.waiting_total(0) == 2)
    threads += [ask("urgent", "x-urgent: yes")]
    wait_for(lambda: ("third", 429) in order or ("second", 429) in order)
    two.wall.release()
    for thread in threads:
        thread.join(20)
    served = [seen.ask["note"] for seen in two.wall.seen]
    assert served[:2] == ["first", "urgent"] and len(served) == 3
    assert sorted(name for name, status in order if status == 200) == sorted(served)
    two.wait_idle()
