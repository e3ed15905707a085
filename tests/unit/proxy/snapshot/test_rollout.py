"""Several workers on one board with a clock in hand: who takes a Snapshot when, and who goes back."""

from pathlib import Path

import pytest

from fleetgate.core.canary_analysis import CANARY_S, PROBATION_S, RETRY_FIRST_S, RETURNED_S
from fleetgate.core.model import Key, Snapshot, encode_snapshot
from fleetgate.ipc.shared_memory import WorkerCell
from fleetgate.ipc.signed_file import LAST_GOOD, PUBLIC_KEY, SNAPSHOT, public_key, sign
from fleetgate.proxy.snapshot.rollout import FOLLOW_S_MAX, Rollout
from fleetgate.proxy.snapshot.snapshot_file import SnapshotFile
from fleetgate.proxy.telemetry.metrics import WorkerMetrics
from tests.loopback.control_rig import board_of
from tests.loopback.rig import deployment, gateway

KEY = b"k" * 32
UNUSABLE = "unusable"


class Hand:
    """One worker without requests: it takes every Snapshot but those that nobody can use."""

    def __init__(self, group: "Group", index: int) -> None:
        self.group, self.index = group, index
        self.used = Snapshot(version=0, made_at_s=0.0)
        self.events: list[str] = []
        self.file = SnapshotFile(group.folder)
        self.rollout = Rollout(self.file, group.board, index, self)
        self.telemetry = WorkerMetrics(group.board, index)
        group.board.set(index, WorkerCell.ACCEPTING, 0)

    def take(self, snapshot: Snapshot) -> bool:
        if snapshot.gateways and snapshot.gateways[0].strategy == UNUSABLE:
            return False
        self.used = snapshot
        self.group.board.set(self.index, WorkerCell.SNAPSHOT_VERSION, snapshot.version)
        return True

    def keep(self, data: bytes, version: int) -> None:
        self.file.keep(data, version)

    def emit_event(self, version: int, sentence: str) -> None:
        self.events.append(sentence)

    def start(self) -> None:
        self.rollout.start(self.group.now_s)
        self.group.board.set(self.index, WorkerCell.ACCEPTING, 1)

    @property
    def keys(self) -> list[str]:
        return [key.name for key in self.used.keys]


class Group:
    """The workers of a machine."""

    def __init__(self, folder: Path, workers: int = 3) -> None:
        self.folder = folder
        self.board = board_of(workers)
        self.now_s = 1000.0
        self.version = 0
        (folder / PUBLIC_KEY).write_bytes(public_key(KEY))
        self.publish("old", ["k1"])
        self.hands = [Hand(self, index) for index in range(workers)]
        for hand in self.hands:
            hand.start()
        self.requests(good=100)
        self.run(11.0)
        self.requests(good=100)

    def publish(self, region: str, keys: list[str], strategy: str = "overflow") -> int:
        """The next version; what differs in `region` differs in routing."""
        self.version += 1
        snapshot = Snapshot(
            version=self.version,
            made_at_s=1.0,
            gateways=(gateway("one", strategy=strategy),),
            deployments=(deployment("one", 8001, 0, region=region),),
            keys=tuple(Key(id=name, name=name, secret_hmac="") for name in keys),
        )
        fresh = self.folder / "fresh"
        fresh.write_bytes(sign(encode_snapshot(snapshot), KEY))
        fresh.rename(self.folder / SNAPSHOT)
        return self.version

    def requests(self, good: int = 0, bad: int = 0, of: int | None = None) -> None:
        for hand in self.hands:
            if of is None or hand.index == of:
                for outcome, count in (("ok", good), ("failed", bad)):
                    labels = {"gateway": "chat", "deployment": "one", "region": "r", "outcome": outcome}
                    index = hand.telemetry.counter("fleetgate_requests_total", labels)
                    hand.telemetry.cells[index] += count

    def run(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += 0.05
            for hand in self.hands:
                self.board.set(hand.index, WorkerCell.HEARTBEAT_MS, int(self.now_s * 1000))
                hand.rollout.tick(self.now_s)

    @property
    def versions(self) -> list[int]:
        return [hand.used.version for hand in self.hands]


@pytest.fixture
def group(tmp_path: Path) -> Group:
    return Group(tmp_path)


def test_one_worker_goes_first_and_the_others_follow_within_half_a_second(group: Group) -> None:
    group.publish("new", ["k1"])
    group.run(0.05)
    assert group.versions == [2, 1, 1]
    group.run(CANARY_S - 0.1)
    assert group.versions == [2, 1, 1]
    group.run(0.25)
    assert group.versions == [2, 2, 2]


def test_a_change_of_keys_alone_goes_everywhere_at_once(group: Group) -> None:
    group.publish("old", [])
    group.run(0.05)
    assert group.versions == [2, 2, 2]
    assert [hand.keys for hand in group.hands] == [[], [], []]


def test_what_breaks_the_canary_reaches_nobody_else(group: Group) -> None:
    group.publish("bad", ["k1"])
    group.run(0.05)
    group.requests(good=2, bad=30, of=0)
    group.requests(good=30, of=1)
    group.run(0.05)
    assert group.versions == [1, 1, 1]
    group.run(10.0)
    assert group.versions == [1, 1, 1]
    (event,) = group.hands[0].events
    assert "Snapshot 2 was rolled back" in event and "30 of 32" in event and "Snapshot 1 is in use" in event


def test_what_breaks_later_takes_everybody_back(group: Group) -> None:
    group.publish("bad", ["k1"])
    group.run(1.0)
    assert group.versions == [2, 2, 2]
    group.requests(bad=50)
    group.run(0.1)
    assert group.versions == [1, 1, 1]
    assert not group.hands[1].events, "one tells for all"


def test_a_canary_without_requests_of_its_own_hears_of_the_others(group: Group) -> None:
    for hand in group.hands[1:]:
        assert hand.index
        group.requests(good=100, of=hand.index)
    group.publish("bad", ["k1"])
    group.run(1.0)
    group.requests(bad=50, of=1)
    group.run(0.1)
    assert group.versions == [1, 1, 1]
    assert "of all workers failed" in group.hands[0].events[0]


def test_after_its_probation_a_snapshot_is_not_given_up_any_more(group: Group) -> None:
    group.publish("new", ["k1"])
    group.run(PROBATION_S + 0.5)
    group.requests(bad=500)
    group.run(20.0)
    assert group.versions == [2, 2, 2]


def give_up(group: Group) -> None:
    group.publish("bad", ["k1"])
    group.run(0.05)
    group.requests(bad=30, of=0)
    group.run(0.1)
    assert group.versions == [1, 1, 1]


def test_a_key_deleted_while_a_snapshot_is_given_up_is_deleted_everywhere(group: Group) -> None:
    give_up(group)
    group.publish("bad", [])
    group.run(0.1)
    assert [hand.keys for hand in group.hands] == [[], [], []]
    assert [hand.used.deployments[0].region for hand in group.hands] == ["old"] * 3


def test_a_key_deleted_during_the_trial_does_not_come_back_when_it_fails(group: Group) -> None:
    group.publish("bad", ["k1"])
    group.run(1.0)
    group.publish("bad", [])
    group.run(0.1)
    group.requests(bad=50)
    group.run(0.1)
    assert [hand.used.deployments[0].region for hand in group.hands] == ["old"] * 3
    assert [hand.keys for hand in group.hands] == [[], [], []]


def test_a_snapshot_that_was_given_up_is_tried_again_and_stays_when_it_does_no_harm(group: Group) -> None:
    give_up(group)
    group.requests(good=200)
    group.run(RETURNED_S + 0.2)
    group.run(RETRY_FIRST_S)
    assert group.versions == [2, 2, 2]
    group.run(PROBATION_S + 1.0)
    group.requests(bad=500)
    group.run(1.0)
    assert group.versions == [2, 2, 2]


def test_going_back_that_does_not_help_is_undone(group: Group) -> None:
    give_up(group)
    group.requests(bad=30, of=0)
    group.run(0.3)
    assert group.versions == [2, 2, 2]
    assert "as many requests failed without it" in group.hands[0].events[-1]


def test_the_next_version_is_judged_afresh(group: Group) -> None:
    give_up(group)
    group.publish("better", ["k1"])
    group.run(1.0)
    assert group.versions == [3, 3, 3]


def test_nobody_follows_to_what_cannot_be_used(group: Group) -> None:
    group.publish("new", ["k1"], strategy=UNUSABLE)
    group.run(5.0)
    assert group.versions == [1, 1, 1]
    assert "cannot be used" in group.hands[0].events[0]
    group.publish("new", ["k1"])
    group.run(1.0)
    assert group.versions == [3, 3, 3]


def test_a_canary_that_hangs_holds_nobody_up(group: Group) -> None:
    group.publish("new", ["k1"])
    group.run(0.05)
    group.hands = group.hands[1:]
    group.run(FOLLOW_S_MAX + 0.1)
    assert group.versions == [2, 2]


def test_a_worker_that_died_with_a_new_snapshot_comes_back_with_the_last_good_one(group: Group) -> None:
    group.publish("deadly", ["k1"])
    group.run(0.05)
    assert group.versions == [2, 1, 1]
    group.board.clear_worker(0)
    group.hands[0] = Hand(group, 0)
    group.hands[0].start()
    group.run(1.0)
    assert group.versions == [1, 1, 1]
    group.run(RETRY_FIRST_S)
    assert group.versions == [2, 2, 2], "a coincidence keeps nothing out for ever"


def test_a_machine_started_again_does_not_take_what_was_given_up(group: Group, tmp_path: Path) -> None:
    give_up(group)
    group.publish("bad", ["k1", "k2"])
    group.run(0.1)
    group.board = board_of(3)
    group.hands = [Hand(group, index) for index in range(3)]
    for hand in group.hands:
        hand.start()
    assert group.versions == [1, 1, 1]
    assert group.hands[0].keys == ["k1", "k2"]
    group.run(RETRY_FIRST_S + 1.0)
    assert group.versions == [3, 3, 3]


def test_a_damaged_file_is_replaced_by_the_copy(group: Group, tmp_path: Path) -> None:
    group.publish("new", ["k1"])
    group.run(PROBATION_S + 1.0)
    assert (tmp_path / LAST_GOOD).read_bytes() == (tmp_path / SNAPSHOT).read_bytes()
    (tmp_path / SNAPSHOT).write_bytes(b"damage")
    hand = Hand(group, 0)
    hand.start()
    assert hand.used.version == 2
    assert "is not signed" in hand.file.refused


def test_a_worker_that_starts_during_a_trial_goes_back_with_the_others(group: Group) -> None:
    group.publish("bad", ["k1"])
    group.run(1.0)
    group.board.clear_worker(2)
    group.hands[2] = Hand(group, 2)
    group.hands[2].start()
    assert group.versions == [2, 2, 2]
    group.requests(bad=50, of=0)
    group.run(0.2)
    assert group.versions == [1, 1, 1]


def test_without_traffic_before_nothing_is_given_up(tmp_path: Path) -> None:
    group = Group(tmp_path, workers=1)
    group.run(30.0)
    group.publish("new", ["k1"])
    group.run(0.1)
    group.requests(bad=50)
    group.run(1.0)
    assert group.versions == [2]
