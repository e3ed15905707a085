"""Recorded decisions taken again under a fleet file: whether they are the same, and what another file would change."""

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

DIFFERENCES_MAX = 20  # differences that are listed; all are counted
NOT_PLACED = "(not placed)"  # refused, or its client left before a Deployment had capacity


class RecordedRoutes:
    """The model routes of a fleet file, for the proxies of each region."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.deployments = {deployment.name: deployment for deployment in snapshot.deployments}
        self.gateways = {gateway.name: gateway for gateway in snapshot.gateways}
        self._snapshot = snapshot
        self._known: dict[tuple[str, str], dict[str, ModelRoute]] = {}

    def find(self, gateway: str, model: str, region: str) -> ModelRoute | None:
        """The route of a model in a Gateway; None if the file does not have it."""
        if (gateway, region) not in self._known:
            known = self.gateways.get(gateway)
            self._known[gateway, region] = model_routes(known, self._snapshot, region) if known is not None else {}
        return self._known[gateway, region].get(model)


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A decision that was not reproduced. Shape: `line` is the line of the record."""

    line: int
    id: str
    at_s: float
    gateway: str
    model: str
    recorded: list[str]
    again: list[str]
    because: str


class Reproduction:
    """Counts the decisions that are reproduced."""

    def __init__(self, routes: RecordedRoutes, region: str | None) -> None:
        self.decisions = 0
        self.reproduced = 0
        self.outrun = 0  # reproduced, but another worker had taken the last slot of the first choice
        self.differences: list[Difference] = []
        self._routes = routes
        self._region = region

    @property
    def share(self) -> float:
        """The share of all decisions that are reproduced; 1 without decisions."""
        return self.reproduced / self.decisions if self.decisions else 1.0

    def add(self, line: int, record: RecordedDecision) -> None:
        """Take one decision again."""
        self.decisions += 1
        region = record.region if self._region is None else self._region
        route = self._routes.find(record.gateway, record.model, region)
        again = replay_decision(record, route) if route is not None else None
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
                    because=_difference_reason(record, route, again),
                )
            )


def _difference_reason(record: RecordedDecision, route: ModelRoute | None, again: Decision | Rejection | None) -> str:
    """The reason for a difference, as far as the record and the file show it."""
    if route is None or again is None:
        return f"the file has no Gateway {record.gateway} with model {record.model}"
    names = {candidate.name for candidate in route.candidates}
    missing = sorted(record.load.keys() - names)
    if missing:
        return f"Gateway {record.gateway} does not list {', '.join(missing)} in this file"
    if isinstance(again, Rejection):
        return "no Deployment has capacity: " + "; ".join(f"{name}: {reason}" for name, reason in again.excluded)
    if not record.order:
        return "the recorded decision was a rejection, but by its recorded load a Deployment had capacity"
    order = [candidate.name for candidate in again.order]
    if order == record.order:
        return f"{record.chosen} was chosen, which is not in the order"
    if sorted(order) != sorted(record.order):
        return "other Deployments had capacity; the recorded load is not the load of the decision"
    return "another order: strategy, ranks, prices or regions differ, or the record's `turn` was changed"


class ReplayTally:
    """The placements of one side of a comparison. Units: `usd` of `priced` requests."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.predicted = 0
        self.missed = 0
        self.priced = 0
        self.usd = 0.0

    def add(self, record: RecordedDecision, chosen: str, tpot_s: float) -> None:
        """Count the placement of one request."""
        self.requests[chosen or NOT_PLACED] += 1
        late = missed_slo(record, chosen, tpot_s)
        if late is not None:
            self.predicted += 1
            self.missed += late
        if chosen and record.load[chosen].usd:
            self.priced += 1
            self.usd += record.load[chosen].usd

    @property
    def missed_share(self) -> float | None:
        """The share of requests predicted to miss the SLO; None if no Profile predicts."""
        return round(self.missed / self.predicted, 4) if self.predicted else None

    @property
    def usd_per_request(self) -> float | None:
        """The mean price of the requests placed on a Deployment with a price."""
        return self.usd / self.priced if self.priced else None


class ComparisonSide(msgspec.Struct):
    """The placement of a request on one side. Shape: `moves` counts the Deployments tried before."""

    moves: int
    record: RecordedDecision
    chosen: str


class Comparison:
    """Takes every decision again under another fleet file and compares the placements.

    The turn of the other strategy is passed from decision to decision, separately for each worker and model route.
    """

    def __init__(self, routes: RecordedRoutes, before: RecordedRoutes, region: str | None) -> None:
        self.decisions = 0
        self.changed = 0
        self.before, self.after = ReplayTally(), ReplayTally()
        self.not_judged: set[str] = set()  # Deployments of the other file that are in no record
        self._routes, self._old_routes = routes, before
        self._region = region
        self._turns: dict[tuple[str, int, str, str], Mapping[str, float]] = {}
        self._open: dict[str, tuple[ComparisonSide, ComparisonSide]] = {}

    def add(self, record: RecordedDecision) -> None:
        """Take one decision under the other file."""
        self.decisions += 1
        region = record.region if self._region is None else self._region
        route = self._routes.find(record.gateway, record.model, region)
        chosen, changed = "", bool(record.chosen)
        adjusted = record
        if route is not None:
            self.not_judged.update(c.name for c in route.candidates if c.name not in record.load)
            adjusted = adjusted_record(record, route, self._old_routes.deployments, self._routes.deployments)
            chosen, changed = self._decide(adjusted, route, (region, record.worker, record.gateway, record.model))
        self.changed += changed
        self._record_placement(record, adjusted, chosen)

    def _decide(
        self, record: RecordedDecision, route: ModelRoute, turn_key: tuple[str, int, str, str]
    ) -> tuple[str, bool]:
        """The Deployment that would be chosen, and whether it is another than the recorded one."""
        again = replay_decision(record, route, self._turns.get(turn_key))
        # The same order has the same result, also if another worker took the last slot of the first choice.
        chosen = record.chosen if is_same_decision(record, again) else chosen_deployment(record, again)
        if isinstance(again, Decision) and chosen:
            self._turns[turn_key] = recorded_turn(route.candidates, again.turn)
        return chosen, chosen != record.chosen

    def _record_placement(self, record: RecordedDecision, adjusted: RecordedDecision, chosen: str) -> None:
        """Keep the first placement of a request until it moves on."""
        moves = len(record.tried)
        sides = ComparisonSide(moves, record, record.chosen), ComparisonSide(moves, adjusted, chosen)
        known = self._open.get(record.id) if record.id else None
        if known is None:
            self._open[record.id or f"{record.at_s}/{self.decisions}"] = sides
            return
        before, after = known
        self._open[record.id] = (_later(before, sides[0]), _later(after, sides[1]))

    def request_ended(self, request_id: str) -> None:
        """Count a request: it takes no further decision."""
        known = self._open.pop(request_id, None)
        if known is not None:
            self._close(*known)

    def finish(self) -> None:
        """Count the requests without a recorded end."""
        for before, after in self._open.values():
            self._close(before, after)
        self._open.clear()

    def _close(self, before: ComparisonSide, after: ComparisonSide) -> None:
        gateway = self._old_routes.gateways.get(before.record.gateway)
        tpot_s = ((gateway.slo if gateway is not None else None) or Slo()).tpot_s
        self.before.add(before.record, before.chosen, tpot_s)
        self.after.add(after.record, after.chosen, tpot_s)


def _later(known: ComparisonSide, new: ComparisonSide) -> ComparisonSide:
    return known if known.chosen and new.moves <= known.moves else new


def adjusted_record(
    record: RecordedDecision, route: ModelRoute, old: Mapping[str, Deployment], new: Mapping[str, Deployment]
) -> RecordedDecision:
    """A record with the prices of another file, and with its limits and CU if they differ from those of the first."""
    units = RequestShape(record.prompt_tokens, record.output_tokens).units
    load: dict[str, RecordedCandidate] = dict(record.load)
    for candidate in route.candidates:
        recorded, old_deployment = load.get(candidate.name), old.get(candidate.name)
        new_deployment = new[candidate.name]
        if recorded is None:
            continue
        recorded = msgspec.structs.replace(recorded, usd=candidate.usd_per_unit * units)
        if old_deployment is not None and old_deployment.concurrency_max != new_deployment.concurrency_max:
            recorded = msgspec.structs.replace(recorded, limit=new_deployment.concurrency_max)
        if old_deployment is not None and old_deployment.units != new_deployment.units and old_deployment.units > 0.0:
            units_now = recorded.units * new_deployment.units / old_deployment.units
            recorded = msgspec.structs.replace(recorded, units=units_now)
        load[candidate.name] = recorded
    return msgspec.structs.replace(record, load=load)


def sides(before: object, after: object) -> dict[str, object]:
    """Two figures, as JSON has them."""
    return {"before": before, "after": after}


def against_json(against: Comparison, simulated: Sequence[object], not_simulated: Sequence[str]) -> dict[str, object]:
    """The result of a comparison, as JSON has it."""
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
