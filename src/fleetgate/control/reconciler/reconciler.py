"""The reconciler observes the replicas, plans the changes (a pure function) and executes the plan."""

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
STEADY_S = 30.0  # a replica that was ready for this long has started successfully; the back-off is reset
NEVER_S = float("inf")
_LIVE = (ReplicaState.STARTING, ReplicaState.READY)


class ObservedReplica(msgspec.Struct, frozen=True):
    """A replica and the provider that reported it."""

    provider: str
    replica: Replica


class BackOff(msgspec.Struct, frozen=True):
    """The delay before a Deployment's next replica starts. Shape: it holds only for the workload of `fingerprint`."""

    failures: int
    until_s: float
    fingerprint: str


class ObservedState(msgspec.Struct, frozen=True):
    """The input of a plan. Shape: `unreachable` names the providers that could not be queried."""

    replicas: tuple[ObservedReplica, ...]
    back_offs: Mapping[str, BackOff] = {}
    unreachable: frozenset[str] = frozenset()


class StartReplica(msgspec.Struct, frozen=True):
    """Start one replica of a Deployment."""

    deployment: ManagedDeployment
    replica_id: str
    because: str


class StopReplica(msgspec.Struct, frozen=True):
    """Stop one replica, or remove one that failed."""

    observed: ObservedReplica
    because: str


class ReplicaPlan(msgspec.Struct, frozen=True):
    """The actions, and the reason in one sentence."""

    actions: tuple[StartReplica | StopReplica, ...]
    because: str


def plan(desired: Sequence[ManagedDeployment], observed: ObservedState, now_s: float) -> ReplicaPlan:
    """Decide which replicas to start and stop so that the desired ones run."""
    actions: list[StartReplica | StopReplica] = []
    wanted = {deployment.name: deployment for deployment in desired}
    by_name: dict[str, list[ObservedReplica]] = {name: [] for name in wanted}
    for one in sorted(observed.replicas, key=lambda one: one.replica.id):
        if one.replica.state is ReplicaState.FAILED:
            actions.append(StopReplica(one, f"{one.replica.id} failed"))
            continue
        deployment = wanted.get(one.replica.deployment)
        if deployment is not None and deployment.provider == one.provider:
            by_name[deployment.name].append(one)
        elif one.replica.state in _LIVE:
            actions.append(
                StopReplica(one, f"stop {one.replica.id}: no Deployment with provider {one.provider} has it")
            )
    taken = {one.replica.id for one in observed.replicas if one.replica.state is not ReplicaState.FAILED}
    for name in sorted(wanted):
        if wanted[name].provider not in observed.unreachable:
            actions += _plan_one(wanted[name], by_name[name], taken, observed.back_offs.get(name), now_s)
    because = "; ".join(action.because for action in actions) or f"nothing to do for {len(wanted)} Deployments"
    return ReplicaPlan(tuple(actions), because)


def _plan_one(
    deployment: ManagedDeployment,
    replicas: Sequence[ObservedReplica],
    taken: Collection[str],
    back_off: BackOff | None,
    now_s: float,
) -> list[StartReplica | StopReplica]:
    fingerprint, desired = deployment.workload.fingerprint, deployment.replicas_desired
    live = [one for one in replicas if one.replica.state in _LIVE]
    current = [one for one in live if one.replica.fingerprint == fingerprint]
    outdated = [one for one in live if one.replica.fingerprint != fingerprint]
    # Stop surplus replicas: first the outdated ones, then those that are not ready yet.
    order = sorted(live, key=lambda one: (one in current, one.replica.state is ReplicaState.READY))
    surplus = order[: max(0, len(live) - desired)]
    reason = f"{len(live)} replicas run, {desired} are desired"
    actions: list[StartReplica | StopReplica] = [
        StopReplica(one, f"stop {one.replica.id}: {reason}") for one in surplus
    ]
    leaving = len(surplus)
    backing_off = back_off is not None and back_off.fingerprint == fingerprint and now_s < back_off.until_s
    settled = len(live) == desired and all(one.replica.state is ReplicaState.READY for one in current)
    if outdated and settled and not backing_off:
        # Replace one replica at a time, and the next when the new one is ready, so that the Deployment keeps serving.
        actions.append(StopReplica(outdated[0], f"stop {outdated[0].replica.id}: its workload was changed"))
        leaving = 1
    if backing_off:
        return actions
    missing = desired - (len(live) - leaving)
    ids = _free_ids(deployment.name, taken, missing)
    reason = f"{len(live) - leaving} of {desired} replicas run"
    return [*actions, *(StartReplica(deployment, replica_id, f"start {replica_id}: {reason}") for replica_id in ids)]


def _free_ids(name: str, taken: Collection[str], count: int) -> list[str]:
    candidates = (f"{name}-{index}" for index in range(len(taken) + max(0, count)))
    return [replica_id for replica_id in candidates if replica_id not in taken][: max(0, count)]


def next_back_off(back_off: BackOff | None, fingerprint: str, now_s: float) -> BackOff:
    """The back-off after one more failure: twice the previous delay, up to `RETRY_MAX_S`."""
    failures = back_off.failures + 1 if back_off is not None and back_off.fingerprint == fingerprint else 1
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
        self._woken = asyncio.Event()
        self._back_offs: dict[str, BackOff] = {}
        self._ready_since_s: dict[str, float] = {}
        self._stopping: dict[str, asyncio.Task[None]] = {}
        # By provider: the last successful observation, used while the provider cannot be queried.
        self._last: dict[str, tuple[ObservedReplica, ...]] = {}
        self._provider_errors: dict[str, str] = {}
        # Reported failures that the provider still lists: the id and the provider's own reference.
        self._failed: set[tuple[str, str]] = set()
        self._observed_once = False  # an earlier process started the replicas that the first observation finds
        self._endpoints: dict[str, tuple[str, ...]] = {}

    def endpoints(self) -> Mapping[str, tuple[str, ...]]:
        """The base URLs of ready replicas by Deployment."""
        return self._endpoints

    def wake(self) -> None:
        """Run the next cycle at once. To be called in the event loop's thread."""
        self._woken.set()

    async def run(self) -> None:
        """Reconcile until cancelled; the replicas keep running."""
        while True:
            self._woken.clear()
            await self.cycle(time.monotonic())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CYCLE_S):
                    await self._woken.wait()

    async def cycle(self, now_s: float) -> ReplicaPlan:
        """Observe, plan and act once. Replicas stop in the background."""
        desired = self._desired()
        observed = await self._observe(desired, now_s)
        decided = plan(desired, observed, now_s)
        starts = []
        for action in decided.actions:
            match action:
                case StartReplica():
                    starts.append(self._start(action, now_s))
                case StopReplica(stopped):
                    if stopped.replica.state is not ReplicaState.FAILED:
                        self._record("Deployment", stopped.replica.deployment, action.because)
                    self._stopping[stopped.replica.id] = asyncio.create_task(self._stop(stopped))
        self._publish()
        # A failed replica must be removed before a new one gets its id.
        failed = [one.replica.id for one in observed.replicas if one.replica.state is ReplicaState.FAILED]
        await asyncio.gather(*(self._stopping[replica_id] for replica_id in failed if replica_id in self._stopping))
        await asyncio.gather(*starts)
        return decided

    async def _observe(self, desired: Sequence[ManagedDeployment], now_s: float) -> ObservedState:
        unreachable: set[str] = {one.provider for one in desired if one.provider not in self._providers}
        for name in unreachable:
            text = f"provider {name} is not installed, so no replica starts there; install the package that provides it"
            self._report_provider(name, text)
        for name, provider in self._providers.items():
            try:
                self._last[name] = tuple(ObservedReplica(name, replica) for replica in await provider.list())
                self._provider_errors.pop(name, None)
            except ProviderError as error:
                unreachable.add(name)
                text = f"provider {name} cannot list its replicas: {error}; its replicas stay as they are"
                self._report_provider(name, text)
        observed = [self._with_stopping(one) for replicas in self._last.values() for one in replicas]
        fingerprints = {one.name: one.workload.fingerprint for one in desired}
        self._back_offs = {
            name: back_off
            for name, back_off in self._back_offs.items()
            if fingerprints.get(name) == back_off.fingerprint
        }
        for one in observed:
            self._track(one.replica, fingerprints.get(one.replica.deployment), now_s)
        self._observed_once = True
        ids = {one.replica.id for one in observed}
        self._failed &= {
            (one.replica.id, one.replica.ref) for one in observed if one.replica.state is ReplicaState.FAILED
        }
        self._ready_since_s = {key: since for key, since in self._ready_since_s.items() if key in ids}
        return ObservedState(
            tuple(one for one in observed if one.provider not in unreachable),
            dict(self._back_offs),
            frozenset(unreachable),
        )

    def _with_stopping(self, one: ObservedReplica) -> ObservedReplica:
        """A replica that is being stopped has state STOPPING, even if its provider still reports it as live."""
        if one.replica.id in self._stopping:
            return ObservedReplica(one.provider, msgspec.structs.replace(one.replica, state=ReplicaState.STOPPING))
        return one

    def _track(self, replica: Replica, fingerprint: str | None, now_s: float) -> None:
        """Update back-off and readiness from an observed replica, and record what changed."""
        name = replica.deployment
        match replica.state:
            case ReplicaState.READY:
                since_s = self._ready_since_s.get(replica.id)
                if since_s is None:
                    self._ready_since_s[replica.id] = now_s
                    how = "is ready" if self._observed_once else "was found running"
                    self._record("Deployment", name, f"replica {replica.id} {how} at {replica.url}")
                elif now_s - since_s >= STEADY_S:
                    self._back_offs.pop(name, None)
            case ReplicaState.FAILED if (replica.id, replica.ref) not in self._failed:
                self._failed.add((replica.id, replica.ref))
                self._ready_since_s.pop(replica.id, None)
                sentence = f"replica {replica.id} failed: {replica.because}"
                if fingerprint == replica.fingerprint:
                    back_off = self._back_offs[name] = next_back_off(self._back_offs.get(name), fingerprint, now_s)
                    sentence += f"; failure {back_off.failures}, so the next start is in {back_off.until_s - now_s:g} s"
                self._record("Deployment", name, sentence)
            case _:
                self._ready_since_s.pop(replica.id, None)

    def _report_provider(self, provider: str, sentence: str) -> None:
        """Record an error of a provider once and not in every cycle."""
        if self._provider_errors.get(provider) != sentence:
            self._provider_errors[provider] = sentence
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
            # A retry cannot succeed. A changed workload has another fingerprint, which ends the back-off.
            self._back_offs[deployment.name] = BackOff(1, NEVER_S, fingerprint)
            sentence = (
                f"replica {action.replica_id} cannot be started: {error}; the next try is when its workload changes"
            )
            self._record("Deployment", deployment.name, sentence)
        except ProviderError as error:
            back_off = next_back_off(self._back_offs.get(deployment.name), fingerprint, now_s)
            self._back_offs[deployment.name] = back_off
            retry = f"failure {back_off.failures}, so the next try is in {back_off.until_s - now_s:g} s"
            sentence = f"replica {action.replica_id} was not started: {error}; {retry}"
            self._record("Deployment", deployment.name, sentence)
        else:
            self._record("Deployment", deployment.name, action.because)

    async def _stop(self, observed: ObservedReplica) -> None:
        replica = observed.replica
        try:
            await self._providers[observed.provider].stop(replica)
        except ProviderError as error:
            sentence = f"replica {replica.id} was not stopped: {error}; the next cycle tries again"
            self._record("Deployment", replica.deployment, sentence)
        finally:
            del self._stopping[replica.id]
            self._woken.set()

    def _publish(self) -> None:
        """Update the base URLs of ready replicas; an unreachable provider keeps its last observation."""
        ready: dict[str, list[str]] = {}
        for replicas in self._last.values():
            for one in map(self._with_stopping, replicas):
                if one.replica.state is ReplicaState.READY:
                    ready.setdefault(one.replica.deployment, []).append(one.replica.url)
        endpoints = {name: tuple(sorted(urls)) for name, urls in sorted(ready.items())}
        if endpoints != self._endpoints:
            self._endpoints = endpoints
            self._on_change()
