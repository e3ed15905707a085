"""The reconciler's plan as a pure function, and its loop over a provider that lives in memory."""

import asyncio
from collections.abc import Sequence

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from fleetgate.control.reconciler.reconciler import (
    NEVER_S,
    RETRY_MAX_S,
    STEADY_S,
    BackOff,
    ObservedReplica,
    ObservedState,
    Reconciler,
    StartReplica,
    StopReplica,
    next_back_off,
    plan,
)
from fleetgate.providers.base import (
    BadSpec,
    Broken,
    ManagedDeployment,
    NotNow,
    ProviderError,
    Replica,
    ReplicaSpec,
    ReplicaState,
    ReplicaWorkload,
)

WORKLOADS = [ReplicaWorkload(command=("a",)), ReplicaWorkload(command=("b",))]
NAMES = ["a", "a-0", "b"]


def deployment(
    name: str, count: int = 1, workload: ReplicaWorkload = WORKLOADS[0], provider: str = "p"
) -> ManagedDeployment:
    """A managed Deployment."""
    return ManagedDeployment(
        name=name, cluster="c", provider=provider, region="r", workload=workload, replicas_desired=count
    )


def seen(
    replica_id: str, name: str, state: ReplicaState = ReplicaState.READY, workload: ReplicaWorkload = WORKLOADS[0]
) -> ObservedReplica:
    """A replica that provider `p` told of."""
    url = f"http://{replica_id}/v1"
    return ObservedReplica(
        "p", Replica(id=replica_id, deployment=name, url=url, state=state, fingerprint=workload.fingerprint)
    )


DESIRED = st.lists(
    st.builds(deployment, st.sampled_from(NAMES), st.integers(0, 4), st.sampled_from(WORKLOADS)),
    unique_by=lambda one: one.name,
)
SEEN = st.lists(
    st.tuples(
        st.sampled_from([*NAMES, "gone"]), st.integers(0, 5), st.sampled_from(ReplicaState), st.sampled_from(WORKLOADS)
    ).map(lambda parts: seen(f"{parts[0]}-{parts[1]}", parts[0], parts[2], parts[3])),
    unique_by=lambda one: one.replica.id,
)
LIVE = (ReplicaState.STARTING, ReplicaState.READY)


def apply(replicas: Sequence[ObservedReplica], actions: Sequence[StartReplica | StopReplica]) -> list[ObservedReplica]:
    """What runs once the actions are done and what was started is ready."""
    stopped = {action.observed.replica.id for action in actions if isinstance(action, StopReplica)}
    left = [one for one in replicas if one.replica.id not in stopped and one.replica.state in LIVE]
    kept = [
        ObservedReplica(one.provider, msgspec.structs.replace(one.replica, state=ReplicaState.READY)) for one in left
    ]
    started = [
        seen(action.replica_id, action.deployment.name, workload=action.deployment.workload)
        for action in actions
        if isinstance(action, StartReplica)
    ]
    return kept + started


@given(DESIRED, SEEN)
def test_it_converges(desired: list[ManagedDeployment], replicas: list[ObservedReplica]) -> None:
    for _ in range(20):
        decided = plan(desired, ObservedState(tuple(replicas)), 0.0)
        replicas = apply(replicas, decided.actions)
    assert decided.actions == ()
    assert decided.because.startswith("nothing to do")
    for wanted in desired:
        running = [one.replica for one in replicas if one.replica.deployment == wanted.name]
        assert len(running) == wanted.replicas_desired
        assert {replica.fingerprint for replica in running} <= {wanted.workload.fingerprint}
    assert len(replicas) == sum(wanted.replicas_desired for wanted in desired)


@given(DESIRED, SEEN)
def test_no_plan_runs_too_many_or_stops_what_is_desired(
    desired: list[ManagedDeployment], replicas: list[ObservedReplica]
) -> None:
    decided = plan(desired, ObservedState(tuple(replicas)), 0.0)
    stops = [action.observed.replica for action in decided.actions if isinstance(action, StopReplica)]
    starts = [action for action in decided.actions if isinstance(action, StartReplica)]
    assert len({replica.id for replica in stops}) == len(stops)
    busy = {one.replica.id for one in replicas if one.replica.state is not ReplicaState.FAILED}
    assert len({start.replica_id for start in starts} - busy) == len(starts)
    for wanted in desired:
        live = [one.replica for one in replicas if one.replica.deployment == wanted.name and one.replica.state in LIVE]
        gone = [replica for replica in stops if replica in live]
        new = [start for start in starts if start.deployment.name == wanted.name]
        assert len(live) - len(gone) + len(new) <= max(wanted.replicas_desired, len(live) - len(gone))
        current = [replica for replica in live if replica.fingerprint == wanted.workload.fingerprint]
        kept = [replica for replica in current if replica not in gone]
        assert len(kept) >= min(len(current), wanted.replicas_desired)
        # A change of workload takes at most one ready replica away at a time.
        if len(live) <= wanted.replicas_desired:
            assert len(gone) <= 1


@given(DESIRED, SEEN, st.permutations(range(12)))
def test_order_of_what_is_seen_changes_nothing(
    desired: list[ManagedDeployment], replicas: list[ObservedReplica], order: list[int]
) -> None:
    shuffled = [replicas[index] for index in order if index < len(replicas)] + replicas[12:]
    assert plan(desired, ObservedState(tuple(replicas)), 0.0) == plan(
        desired[::-1], ObservedState(tuple(shuffled)), 0.0
    )


@given(st.integers(1, 60), st.floats(0, 1e6))
def test_back_off_grows_to_its_limit_and_belongs_to_one_workload(failures: int, now_s: float) -> None:
    hold: BackOff | None = None
    waits = []
    for _ in range(failures):
        hold = next_back_off(hold, "f", now_s)
        waits.append(hold.until_s - now_s)
    assert waits == sorted(waits)
    assert max(waits) <= RETRY_MAX_S + 1e-6
    assert hold is not None
    one = deployment("a")
    held = {"a": BackOff(hold.failures, hold.until_s, one.workload.fingerprint)}
    assert plan([one], ObservedState((), held), now_s).actions == ()
    assert plan([one], ObservedState((), held), hold.until_s + 1e-6).actions != ()
    assert plan([deployment("a", workload=WORKLOADS[1])], ObservedState((), held), now_s).actions != ()


def test_a_blind_provider_is_left_alone() -> None:
    assert plan([deployment("a")], ObservedState((), {}, frozenset({"p"})), 0.0).actions == ()


def test_an_outdated_replica_stays_while_the_new_workload_fails() -> None:
    changed = deployment("a", 2, WORKLOADS[1])
    old = (seen("a-0", "a"), seen("a-1", "a"))
    first = plan([changed], ObservedState(old), 0.0)
    assert [type(action) for action in first.actions] == [StopReplica, StartReplica]
    hold = next_back_off(None, WORKLOADS[1].fingerprint, 1.0)
    assert plan([changed], ObservedState(old[1:], {"a": hold}), 1.1).actions == ()
    again = plan([changed], ObservedState(old[1:], {"a": hold}), 10.0)
    assert [type(action) for action in again.actions] == [StartReplica]


class Memory:
    """A provider whose place is a dictionary, with the troubles that a test gives it."""

    name = "p"

    def __init__(self) -> None:
        self.replicas: dict[str, Replica] = {}
        self.start_error: Exception | None = None
        self.list_error: Exception | None = None
        self.stop_error: ProviderError | None = None
        self.starts = 0
        self.state_at_start = ReplicaState.STARTING

    async def start(self, spec: ReplicaSpec) -> Replica:
        """Take a replica in; it is ready when the test says so."""
        self.starts += 1
        if self.start_error is not None:
            raise self.start_error
        begun = seen(spec.id, spec.deployment, self.state_at_start, spec.workload).replica
        begun = msgspec.structs.replace(begun, ref=str(self.starts))
        self.replicas[spec.id] = begun
        return begun

    async def stop(self, replica: Replica) -> None:
        """Forget a replica."""
        if self.stop_error is not None:
            raise self.stop_error
        self.replicas.pop(replica.id, None)

    async def list(self) -> Sequence[Replica]:
        """What there is."""
        if self.list_error is not None:
            raise self.list_error
        return list(self.replicas.values())

    def turn(self, replica_id: str, state: ReplicaState) -> None:
        """Put a replica into a state."""
        self.replicas[replica_id] = msgspec.structs.replace(self.replicas[replica_id], state=state)


class World:
    """A reconciler over memory, stepped by hand."""

    def __init__(self, *desired: ManagedDeployment) -> None:
        self.memory = Memory()
        self.desired = list(desired)
        self.told: list[str] = []
        self.changes = 0
        self.reconciler = Reconciler(
            lambda: self.desired, {"p": self.memory}, self._changed, lambda _kind, _name, said: self.told.append(said)
        )

    def _changed(self) -> None:
        self.changes += 1

    async def cycle(self, now_s: float) -> None:
        """One cycle, and the stops that it began."""
        await self.reconciler.cycle(now_s)
        await asyncio.sleep(0)


def test_the_loop_publishes_what_is_ready_once_and_tells_why() -> None:
    async def run() -> World:
        world = World(deployment("a"))
        await world.cycle(0.0)
        assert world.reconciler.endpoints() == {}
        world.memory.turn("a-0", ReplicaState.READY)
        for now_s in (1.0, 2.0, 3.0):
            await world.cycle(now_s)
        assert world.reconciler.endpoints() == {"a": ("http://a-0/v1",)}
        assert world.changes == 1
        world.memory.list_error = Broken("no answer")
        await world.cycle(4.0)
        await world.cycle(5.0)
        assert world.reconciler.endpoints() == {"a": ("http://a-0/v1",)}
        world.memory.list_error = None
        world.desired.clear()
        await world.cycle(6.0)
        assert world.reconciler.endpoints() == {}
        assert world.memory.replicas == {}
        return world

    assert asyncio.run(run()).told == [
        "start a-0: 0 of 1 replicas run",
        "replica a-0 is ready at http://a-0/v1",
        "provider p cannot list its replicas: no answer; its replicas stay as they are",
        "stop a-0: no Deployment with provider p has it",
    ]


def test_what_an_earlier_process_started_is_kept_and_told_as_found() -> None:
    async def run() -> World:
        world = World(deployment("a"))
        world.memory.replicas["a-0"] = seen("a-0", "a").replica
        await world.cycle(0.0)
        return world

    world = asyncio.run(run())
    assert world.memory.starts == 0
    assert world.told == ["replica a-0 was found running at http://a-0/v1"]


def test_crashes_back_off_and_steady_running_forgives_them() -> None:
    async def run() -> None:
        world = World(deployment("a"))
        now_s, waits = 0.0, []
        for _ in range(4):
            await world.cycle(now_s)
            world.memory.turn("a-0", ReplicaState.FAILED)
            crashed_s = now_s
            while "a-0" not in world.memory.replicas or world.memory.replicas["a-0"].state is ReplicaState.FAILED:
                now_s += 0.25
                await world.cycle(now_s)
            waits.append(now_s - crashed_s)
        assert waits == sorted(waits)
        assert waits[-1] >= 4.0
        world.memory.turn("a-0", ReplicaState.READY)
        await world.cycle(now_s)
        await world.cycle(now_s + STEADY_S)
        world.memory.turn("a-0", ReplicaState.FAILED)
        await world.cycle(now_s + STEADY_S + 1)
        await world.cycle(now_s + STEADY_S + 2)
        assert world.memory.replicas["a-0"].state is ReplicaState.STARTING

    asyncio.run(run())


def test_what_crashes_at_once_is_not_started_in_every_cycle() -> None:
    async def run() -> World:
        world = World(deployment("a"))
        world.memory.state_at_start = ReplicaState.FAILED
        for step in range(120):
            await world.cycle(step * 0.5)
        return world

    world = asyncio.run(run())
    assert 4 <= world.memory.starts <= 9
    assert sum("failed" in sentence for sentence in world.told) == world.memory.starts


def test_a_failure_that_cannot_be_cleared_away_is_told_once() -> None:
    async def run() -> World:
        world = World(deployment("a"))
        await world.cycle(0.0)
        world.memory.turn("a-0", ReplicaState.FAILED)
        world.memory.stop_error = Broken("no answer")
        for step in range(5):
            await world.cycle(1.0 + step)
        return world

    assert sum("a-0 failed" in sentence for sentence in asyncio.run(run()).told) == 1


def test_a_mistake_is_tried_once_and_a_shortage_again_and_again() -> None:
    async def run(error: Exception) -> tuple[int, World]:
        world = World(deployment("a"))
        world.memory.start_error = error
        for step in range(40):
            await world.cycle(step * 0.5)
        return world.memory.starts, world

    starts, world = asyncio.run(run(BadSpec("give workload.command")))
    assert starts == 1
    assert world.told == [
        "replica a-0 cannot be started: give workload.command; the next try is when its workload changes"
    ]
    starts, world = asyncio.run(run(NotNow("no room")))
    assert 3 <= starts <= 8
    assert NEVER_S > RETRY_MAX_S


def test_an_unknown_provider_is_told_once() -> None:
    async def run() -> list[str]:
        world = World(deployment("a", provider="moon"))
        await world.cycle(0.0)
        await world.cycle(1.0)
        return world.told

    assert asyncio.run(run()) == [
        "provider moon is not installed, so no replica starts there; install the package that provides it"
    ]
