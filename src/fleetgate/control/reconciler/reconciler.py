"""The reconciler: looks at what runs, plans what must change (a pure function), and does it."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec

from fleetgate.providers.base import (
    BadSpec,
    ManagedDeployment,
    Provider,
    ProviderError,
    Replica,
    ReplicaSpec,
    ReplicaState,
)

CYCLE_S = 0.5
RETRY_FIRST_S = 0.5
RETRY_MAX_S = 60.0
STEADY_S = 30.0  # a replica that was ready this long has not failed at its start; the back-off begins anew
NEVER_S = float("inf")
_LIVE = (ReplicaState.STARTING, ReplicaState.READY)


class ObservedReplica(msgspec.Struct, frozen=True):
    """A replica and the provider that told of it."""

    provider: str
    replica: Replica


class BackOff(msgspec.Struct, frozen=True):
    """Why a Deployment's next replica waits. Shape: it holds only for the workload with that fingerprint."""

    failures: int
    until_s: float
    fingerprint: str


class ObservedState(msgspec.Struct, frozen=True):
    """What is known when a plan is made. Shape: `blind` are providers that could not be asked just now."""

    seen: tuple[ObservedReplica, ...]
    holds: Mapping[str, BackOff] = {}
    blind: frozenset[str] = frozenset()


class StartReplica(msgspec.Struct, frozen=True):
    """Start one replica of a Deployment."""

    deployment: ManagedDeployment
    replica_id: str
    because: str


class StopReplica(msgspec.Struct, frozen=True):
    """Stop one replica, or forget one that failed."""

    seen: ObservedReplica
    because: str


class ReplicaPlan(msgspec.Struct, frozen=True):
    """What to do, and why, in one sentence."""

    actions: tuple[StartReplica | StopReplica, ...]
    because: str


def plan(desired: Sequence[ManagedDeployment], observed: ObservedState, now_s: float) -> ReplicaPlan:
    """Decide what to start and stop so that what runs becomes what is desired."""
    actions: list[StartReplica | StopReplica] = []
    wanted = {deployment.name: deployment for deployment in desired}
    by_name: dict[str, list[ObservedReplica]] = {name: [] for name in wanted}
    for seen in sorted(observed.seen, key=lambda seen: seen.replica.id):
        if seen.replica.state is ReplicaState.FAILED:
            actions.append(StopReplica(seen, f"{seen.replica.id} failed"))
            continue
        deployment = wanted.get(seen.replica.deployment)
        if deployment is not None and deployment.provider == seen.provider:
            by_name[deployment.name].append(seen)
        elif seen.replica.state in _LIVE:
            actions.append(StopReplica(seen, f"stop {seen.replica.id}: no Deployment wants it there"))
    taken = {seen.replica.id for seen in observed.seen if seen.replica.state is not ReplicaState.FAILED}
    for name in sorted(wanted):
        if wanted[name].provider not in observed.blind:
            actions += _plan_one(wanted[name], by_name[name], taken, observed.holds.get(name), now_s)
    because = "; ".join(action.because for action in actions) or f"nothing to do: {len(wanted)} Deployments are kept"
    return ReplicaPlan(tuple(actions), because)


def _plan_one(
    deployment: ManagedDeployment,
    seen: Sequence[ObservedReplica],
    taken: Collection[str],
    hold: BackOff | None,
    now_s: float,
) -> list[StartReplica | StopReplica]:
    fingerprint, want = deployment.workload.fingerprint, deployment.replicas_desired
    live = [one for one in seen if one.replica.state in _LIVE]
    current = [one for one in live if one.replica.fingerprint == fingerprint]
    outdated = [one for one in live if one.replica.fingerprint != fingerprint]
    # What is surplus goes: first what is out of date, then what is not ready yet.
    order = sorted(live, key=lambda one: (one in current, one.replica.state is ReplicaState.READY))
    surplus = order[: max(0, len(live) - want)]
    why = f"{len(live)} replicas run, {want} are desired"
    actions: list[StartReplica | StopReplica] = [StopReplica(one, f"stop {one.replica.id}: {why}") for one in surplus]
    leaving = len(surplus)
    held = hold is not None and hold.fingerprint == fingerprint and now_s < hold.until_s
    settled = len(live) == want and all(one.replica.state is ReplicaState.READY for one in current)
    if outdated and settled and not held:
        # One at a time, the next only when the new one is ready, so that a Deployment of several goes on serving.
        actions.append(StopReplica(outdated[0], f"stop {outdated[0].replica.id}: its workload was changed"))
        leaving = 1
    if held:
        return actions
    missing = want - (len(live) - leaving)
    ids = _free_ids(deployment.name, taken, missing)
    why = f"{len(live) - leaving} of {want} replicas run"
    return [*actions, *(StartReplica(deployment, replica_id, f"start {replica_id}: {why}") for replica_id in ids)]


def _free_ids(name: str, taken: Collection[str], count: int) -> list[str]:
    candidates = (f"{name}-{index}" for index in range(len(taken) + max(0, count)))
    return [replica_id for replica_id in candidates if replica_id not in taken][: max(0, count)]


def next_back_off(hold: BackOff | None, fingerprint: str, now_s: float) -> BackOff:
    """The hold after one more failure: twice as long as the one before, up to `RETRY_MAX_S`."""
    failures = hold.failures + 1 if hold is not None and hold.fingerprint == fingerprint else 1
    wait_s = min(RETRY_MAX_S, RETRY_FIRST_S * 2.0 ** min(failures - 1, 30))
    return BackOff(failures, now_s + wait_s, fingerprint)


class Reconciler:
    """Keeps the desired replicas of managed Deployments running."""

    def __init__(
        self,
        desired: Callable[[], Sequence[ManagedDeployment]],
        providers: Mapping[str, Provider],
        on_change: Callable[[], None],
        record: Callable[[str, str, str], None],
    ) -> None:
        self._desired = desired
        self._providers = providers
        self._on_change = on_change
        self._record = record
        self._poked = asyncio.Event()
        self._holds: dict[str, BackOff] = {}
        self._ready_since_s: dict[str, float] = {}
        self._stopping: dict[str, asyncio.Task[None]] = {}
        self._last: dict[
            str, tuple[ObservedReplica, ...]
        ] = {}  # by provider, for the cycles in which it cannot be asked
        self._troubles: dict[str, str] = {}
        # Failures that are told and not forgotten yet by their provider: id and the provider's own name for it.
        self._failed: set[tuple[str, str]] = set()
        self._looked = False  # what is ready at the first look was started by an earlier process
        self._endpoints: dict[str, tuple[str, ...]] = {}

    def endpoints(self) -> Mapping[str, tuple[str, ...]]:
        """The base URLs of ready replicas by Deployment."""
        return self._endpoints

    def poke(self) -> None:
        """Look again at once; to be called in the event loop's own thread."""
        self._poked.set()

    async def run(self) -> None:
        """Reconcile until cancelled; what runs goes on running."""
        while True:
            self._poked.clear()
            await self.cycle(time.monotonic())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CYCLE_S):
                    await self._poked.wait()

    async def cycle(self, now_s: float) -> ReplicaPlan:
        """Observe, plan and act once; what is stopped goes on stopping in the background."""
        desired = self._desired()
        observed = await self._observe(desired, now_s)
        decided = plan(desired, observed, now_s)
        starts = []
        for action in decided.actions:
            match action:
                case StartReplica():
                    starts.append(self._start(action, now_s))
                case StopReplica(seen):
                    if seen.replica.state is not ReplicaState.FAILED:
                        self._record("Deployment", seen.replica.deployment, action.because)
                    self._stopping[seen.replica.id] = asyncio.create_task(self._stop(seen))
        self._publish()
        # A replica that failed is forgotten before its name is given again.
        failed = [seen.replica.id for seen in observed.seen if seen.replica.state is ReplicaState.FAILED]
        await asyncio.gather(*(self._stopping[replica_id] for replica_id in failed if replica_id in self._stopping))
        await asyncio.gather(*starts)
        return decided

    async def _observe(self, desired: Sequence[ManagedDeployment], now_s: float) -> ObservedState:
        blind: set[str] = {one.provider for one in desired if one.provider not in self._providers}
        for name in blind:
            self._trouble(name, f"this Fleetgate has no provider {name}; nothing is started there")
        for name, provider in self._providers.items():
            try:
                self._last[name] = tuple(ObservedReplica(name, replica) for replica in await provider.list())
                self._troubles.pop(name, None)
            except ProviderError as error:
                blind.add(name)
                self._trouble(name, f"provider {name} cannot be asked: {error}")
        seen = [self._as_known(one) for replicas in self._last.values() for one in replicas]
        fingerprints = {one.name: one.workload.fingerprint for one in desired}
        self._holds = {name: hold for name, hold in self._holds.items() if fingerprints.get(name) == hold.fingerprint}
        for one in seen:
            self._learn(one.replica, fingerprints.get(one.replica.deployment), now_s)
        self._looked = True
        ids = {one.replica.id for one in seen}
        self._failed &= {(one.replica.id, one.replica.ref) for one in seen if one.replica.state is ReplicaState.FAILED}
        self._ready_since_s = {key: since for key, since in self._ready_since_s.items() if key in ids}
        return ObservedState(
            tuple(one for one in seen if one.provider not in blind), dict(self._holds), frozenset(blind)
        )

    def _as_known(self, seen: ObservedReplica) -> ObservedReplica:
        """What is being stopped is no longer live, whatever its provider still says."""
        if seen.replica.id in self._stopping:
            return ObservedReplica(seen.provider, msgspec.structs.replace(seen.replica, state=ReplicaState.STOPPING))
        return seen

    def _learn(self, replica: Replica, fingerprint: str | None, now_s: float) -> None:
        """Remember failures and steady running, and tell both."""
        name = replica.deployment
        match replica.state:
            case ReplicaState.READY:
                since_s = self._ready_since_s.get(replica.id)
                if since_s is None:
                    self._ready_since_s[replica.id] = now_s
                    how = "is ready" if self._looked else "was found running"
                    self._record("Deployment", name, f"replica {replica.id} {how} at {replica.url}")
                elif now_s - since_s >= STEADY_S:
                    self._holds.pop(name, None)
            case ReplicaState.FAILED if (replica.id, replica.ref) not in self._failed:
                self._failed.add((replica.id, replica.ref))
                self._ready_since_s.pop(replica.id, None)
                told = f"replica {replica.id} failed: {replica.because}"
                if fingerprint == replica.fingerprint:
                    hold = self._holds[name] = next_back_off(self._holds.get(name), fingerprint, now_s)
                    told += f"; it is started again in {hold.until_s - now_s:g} s"
                self._record("Deployment", name, told)
            case _:
                self._ready_since_s.pop(replica.id, None)

    def _trouble(self, provider: str, sentence: str) -> None:
        """Tell a provider's trouble once, not in every cycle."""
        if self._troubles.get(provider) != sentence:
            self._troubles[provider] = sentence
            self._record("Provider", provider, sentence)

    async def _start(self, action: StartReplica, now_s: float) -> None:
        deployment = action.deployment
        fingerprint = deployment.workload.fingerprint
        spec = ReplicaSpec(
            id=action.replica_id,
            deployment=deployment.name,
            cluster=deployment.cluster,
            region=deployment.region,
            workload=deployment.workload,
        )
        try:
            await self._providers[deployment.provider].start(spec)
        except BadSpec as error:
            # Trying again cannot help; a changed workload has another fingerprint, which lifts the hold.
            self._holds[deployment.name] = BackOff(1, NEVER_S, fingerprint)
            self._record("Deployment", deployment.name, f"{action.replica_id} cannot be started: {error}")
        except ProviderError as error:
            hold = next_back_off(self._holds.get(deployment.name), fingerprint, now_s)
            self._holds[deployment.name] = hold
            told = f"{action.replica_id} was not started: {error}; the next try is in {hold.until_s - now_s:g} s"
            self._record("Deployment", deployment.name, told)
        else:
            self._record("Deployment", deployment.name, action.because)

    async def _stop(self, seen: ObservedReplica) -> None:
        try:
            await self._providers[seen.provider].stop(seen.replica)
        except ProviderError as error:
            told = f"{seen.replica.id} was not stopped: {error}; it is tried again"
            self._record("Deployment", seen.replica.deployment, told)
        finally:
            del self._stopping[seen.replica.id]
            self._poked.set()

    def _publish(self) -> None:
        """Say where ready replicas answer; of a provider that cannot be asked, what was true last."""
        ready: dict[str, list[str]] = {}
        for replicas in self._last.values():
            for seen in map(self._as_known, replicas):
                if seen.replica.state is ReplicaState.READY:
                    ready.setdefault(seen.replica.deployment, []).append(seen.replica.url)
        endpoints = {name: tuple(sorted(urls)) for name, urls in sorted(ready.items())}
        if endpoints != self._endpoints:
            self._endpoints = endpoints
            self._on_change()
