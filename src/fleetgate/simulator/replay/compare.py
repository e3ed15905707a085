"""Recorded decisions under a fleet file: whether they come out as they did, and what another file would change."""

from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from fleetgate.core.capacity.latency_model import RequestShape
from fleetgate.core.model import Deployment, Slo, Snapshot
from fleetgate.core.routing.decision_record import (
    RecordedCandidate,
    RecordedDecision,
    chosen_deployment,
    is_same_decision,
    missed_slo,
    recorded_turn,
    replay_decision,
)
from fleetgate.core.routing.route import Decision, ModelRoute, Rejection, model_routes

DIFFERENCES_MAX = 20  # told one by one; all are counted
NOWHERE = "(not placed)"  # refused, or its client left before there was room


class RecordedRoutes:
    """The Lanes of a fleet file as the proxies of each region see them."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.deployments = {deployment.name: deployment for deployment in snapshot.deployments}
        self.gateways = {gateway.name: gateway for gateway in snapshot.gateways}
        self._snapshot = snapshot
        self._known: dict[tuple[str, str], dict[str, ModelRoute]] = {}

    def find(self, gateway: str, model: str, region: str) -> ModelRoute | None:
        """One model in one Gateway; None where the file has it not."""
        if (gateway, region) not in self._known:
            known = self.gateways.get(gateway)
            self._known[gateway, region] = model_routes(known, self._snapshot, region) if known is not None else {}
        return self._known[gateway, region].get(model)


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A decision that did not come out as it was recorded. Shape: `line` is where the record stands."""

    line: int
    id: str
    at_s: float
    gateway: str
    model: str
    recorded: list[str]
    again: list[str]
    because: str


class Reproduction:
    """Counts how many decisions come out as they were recorded."""

    def __init__(self, lanes: RecordedRoutes, region: str | None) -> None:
        self.decisions = 0
        self.reproduced = 0
        self.outrun = 0  # came out the same, but another worker had taken the first choice's last place
        self.differences: list[Difference] = []
        self._lanes = lanes
        self._region = region

    @property
    def share(self) -> float:
        """Of all decisions; 1 of none."""
        return self.reproduced / self.decisions if self.decisions else 1.0

    def see(self, line: int, record: RecordedDecision) -> None:
        """Take one decision again."""
        self.decisions += 1
        region = record.region if self._region is None else self._region
        lane = self._lanes.find(record.gateway, record.model, region)
        again = replay_decision(record, lane) if lane is not None else None
        if again is not None and is_same_decision(record, again):
            self.reproduced += 1
            self.outrun += chosen_deployment(record, again) != record.chosen
        elif len(self.differences) < DIFFERENCES_MAX:
            self.differences.append(
                Difference(
                    line=line,
                    id=record.id,
                    at_s=record.at_s,
                    gateway=record.gateway,
                    model=record.model,
                    recorded=record.order,
                    again=[candidate.name for candidate in again.order] if isinstance(again, Decision) else [],
                    because=_because(record, lane, again),
                )
            )


def _because(record: RecordedDecision, lane: ModelRoute | None, again: Decision | Rejection | None) -> str:
    """Why a decision came out otherwise, as far as the two configurations tell."""
    if lane is None or again is None:
        return f"the file has no Gateway {record.gateway} with model {record.model}"
    names = {candidate.name for candidate in lane.candidates}
    missing = sorted(record.load.keys() - names)
    if missing:
        return f"Gateway {record.gateway} does not list {', '.join(missing)} in this file"
    if isinstance(again, Rejection):
        return "nobody has room: " + "; ".join(f"{name}: {why}" for name, why in again.excluded)
    if not record.order:
        return "nobody had room then; with what is recorded somebody has"
    order = [candidate.name for candidate in again.order]
    if order == record.order:
        return f"{record.chosen} was chosen, which is not in the order"
    if sorted(order) != sorted(record.order):
        return "not the same Deployments had room; the record's load is not what was decided from"
    return "another order: strategy, ranks, prices or regions differ, or the record's `turn` is not what it was"


class ReplayTally:
    """What became of requests on one side of a comparison. Units: `usd` of `priced` requests."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.predicted = 0
        self.missed = 0
        self.priced = 0
        self.usd = 0.0

    def add(self, record: RecordedDecision, chosen: str, tpot_s: float) -> None:
        """One request's place."""
        self.requests[chosen or NOWHERE] += 1
        late = missed_slo(record, chosen, tpot_s)
        if late is not None:
            self.predicted += 1
            self.missed += late
        if chosen and record.load[chosen].usd:
            self.priced += 1
            self.usd += record.load[chosen].usd

    @property
    def missed_share(self) -> float | None:
        """Of those that a Profile predicts."""
        return round(self.missed / self.predicted, 4) if self.predicted else None

    @property
    def usd_per_request(self) -> float | None:
        """Of those that were placed where a price is written."""
        return self.usd / self.priced if self.priced else None


class ComparisonSide(msgspec.Struct):
    """Where a request ended up on one side. Shape: `moves` counts the Deployments it had tried before."""

    moves: int
    record: RecordedDecision
    chosen: str


class Comparison:
    """Takes every decision under another fleet file and compares where requests go.

    A turn is handed on from decision to decision as the other strategy leaves it, one for each worker and Lane.
    """

    def __init__(self, lanes: RecordedRoutes, before: RecordedRoutes, region: str | None) -> None:
        self.decisions = 0
        self.changed = 0
        self.before, self.after = ReplayTally(), ReplayTally()
        self.not_judged: set[str] = set()  # Deployments of the other file that no record tells of
        self._lanes, self._old = lanes, before
        self._region = region
        self._turns: dict[tuple[str, int, str, str], Mapping[str, float]] = {}
        self._open: dict[str, tuple[ComparisonSide, ComparisonSide]] = {}

    def see(self, record: RecordedDecision) -> None:
        """Take one decision under the other file."""
        self.decisions += 1
        region = record.region if self._region is None else self._region
        lane = self._lanes.find(record.gateway, record.model, region)
        chosen, changed = "", bool(record.chosen)
        adjusted = record
        if lane is not None:
            self.not_judged.update(c.name for c in lane.candidates if c.name not in record.load)
            adjusted = as_written(record, lane, self._old.deployments, self._lanes.deployments)
            chosen, changed = self._decide(adjusted, lane, (region, record.worker, record.gateway, record.model))
        self.changed += changed
        self._place(record, adjusted, chosen)

    def _decide(
        self, record: RecordedDecision, lane: ModelRoute, turns_of: tuple[str, int, str, str]
    ) -> tuple[str, bool]:
        """Whom the request would go to, and whether that is another than was chosen."""
        again = replay_decision(record, lane, self._turns.get(turns_of))
        # With the same order the same thing happens, also where another worker was quicker.
        chosen = record.chosen if is_same_decision(record, again) else chosen_deployment(record, again)
        if isinstance(again, Decision) and chosen:
            self._turns[turns_of] = recorded_turn(lane.candidates, again.turn)
        return chosen, chosen != record.chosen

    def _place(self, record: RecordedDecision, adjusted: RecordedDecision, chosen: str) -> None:
        """The first place that a request finds is its own, until it has to move on."""
        moves = len(record.tried)
        sides = ComparisonSide(moves, record, record.chosen), ComparisonSide(moves, adjusted, chosen)
        known = self._open.get(record.id) if record.id else None
        if known is None:
            self._open[record.id or f"{record.at_s}/{self.decisions}"] = sides
            return
        was, would = known
        self._open[record.id] = (_later(was, sides[0]), _later(would, sides[1]))

    def ended(self, request_id: str) -> None:
        """A request will not look for another place."""
        known = self._open.pop(request_id, None)
        if known is not None:
            self._close(*known)

    def finish(self) -> None:
        """The records are at their end: what had not ended counts as it stands."""
        for was, would in self._open.values():
            self._close(was, would)
        self._open.clear()

    def _close(self, was: ComparisonSide, would: ComparisonSide) -> None:
        gateway = self._old.gateways.get(was.record.gateway)
        tpot_s = ((gateway.slo if gateway is not None else None) or Slo()).tpot_s
        self.before.add(was.record, was.chosen, tpot_s)
        self.after.add(would.record, would.chosen, tpot_s)


def _later(known: ComparisonSide, new: ComparisonSide) -> ComparisonSide:
    return known if known.chosen and new.moves <= known.moves else new


def as_written(
    record: RecordedDecision, lane: ModelRoute, old: Mapping[str, Deployment], new: Mapping[str, Deployment]
) -> RecordedDecision:
    """A record with the prices of another file, and with its limits and CU where it writes others than the first."""
    units = RequestShape(record.prompt_tokens, record.output_tokens).units
    load: dict[str, RecordedCandidate] = dict(record.load)
    for candidate in lane.candidates:
        stood, was, now = load.get(candidate.name), old.get(candidate.name), new[candidate.name]
        if stood is None:
            continue
        stood = msgspec.structs.replace(stood, usd=candidate.usd_per_unit * units)
        if was is not None and was.concurrency_max != now.concurrency_max:
            stood = msgspec.structs.replace(stood, limit=now.concurrency_max)
        if was is not None and was.units != now.units and was.units > 0.0:
            stood = msgspec.structs.replace(stood, units=stood.units * now.units / was.units)
        load[candidate.name] = stood
    return msgspec.structs.replace(record, load=load)


def sides(before: object, after: object) -> dict[str, object]:
    """Two figures side by side, as JSON has them."""
    return {"before": before, "after": after}


def against_json(against: Comparison, simulated: Sequence[object], not_simulated: Sequence[str]) -> dict[str, object]:
    """What another file would change, as JSON has it."""
    before, after = against.before, against.after
    names = sorted(before.requests.keys() | after.requests.keys())
    return {
        "changed": against.changed,
        "changed_share": against.changed / against.decisions if against.decisions else 0.0,
        "requests": {name: sides(before.requests[name], after.requests[name]) for name in names},
        "slo_missed_share": sides(before.missed_share, after.missed_share),
        "usd_per_request": sides(before.usd_per_request, after.usd_per_request),
        "not_judged": sorted(against.not_judged),
        "simulated": [msgspec.to_builtins(pair) for pair in simulated],
        "not_simulated": list(not_simulated),
    }
