"""Recorded routing decisions, so that they can be replayed: under the same configuration or under another.

A record names Deployments, not slots, because slots differ from one configuration to the next.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import msgspec

from fleetgate.core.admission.request_queue import Priority
from fleetgate.core.capacity.latency_model import LatencyPrediction
from fleetgate.core.routing.route import Decision, ModelRoute, Rejection, RejectionReason, route
from fleetgate.core.routing.scheduler import ConsideredDecision, ScheduleRequest, limit_for_priority, preferred_first
from fleetgate.core.routing.strategies import Candidate, CandidateState, Load, Turn


class RecordedCandidate(msgspec.Struct, frozen=True, array_like=True):
    """The state of one candidate at the decision.

    Shape: `fit` is the predicted TTFT and TPOT in seconds, the target that would be missed or an empty text, and
    whether the request would delay others.
    """

    in_flight: int
    health: float
    limit: int
    units: float
    fit: tuple[float, float, str, bool] | None = None
    warm: float = 0.0
    usd: float = 0.0
    places: int = 0


class RecordedDecision(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="record", tag="decision"
):
    """One decision with its inputs.

    Units: `at_s` since the epoch; `target_s` is the TTFT target, `waited_s` the part of it that had passed.
    Shape: `load` has the Deployments that policies left; `order` is empty for a rejection, and `chosen` is empty if no
    Deployment took the request. `region` and `worker` name the proxy that decided, because each has its own `turn`.
    """

    at_s: float
    gateway: str
    model: str
    key: str
    prompt_tokens: float
    output_tokens: float
    load: dict[str, RecordedCandidate]
    turn: dict[str, float]
    tried: list[str]
    order: list[str]
    chosen: str
    id: str = ""
    region: str = ""
    worker: int = 0
    target_s: float = 0.0
    waited_s: float = 0.0
    priority: int = int(Priority.STANDARD)
    preferred: list[str] = []


class RecordedEnd(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="record", tag="ended"):
    """How a request ended.

    Units: `at_s` since the epoch, at its end; `duration_s` from its arrival; `ttft_s` 0 without a first token; tokens
    are the engine's count, or our estimate if `estimated`.
    """

    at_s: float
    id: str
    gateway: str
    model: str
    key: str
    outcome: str
    duration_s: float
    prompt_tokens: float
    output_tokens: float
    deployment: str = ""
    region: str = ""
    worker: int = 0
    ttft_s: float = 0.0
    estimated: bool = False


Record = RecordedDecision | RecordedEnd

# The format has no field for `paused`: a paused candidate is written with so many more in flight and a limit.
PAUSED_IN_FLIGHT = 1_000_000

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Record).decode


def encode_record(record: Record) -> bytes:
    """A record as one line of JSON."""
    return _encode(record) + b"\n"


def decode_record(line: bytes) -> Record:
    """The record of a line.

    Raises: `msgspec.DecodeError` or `UnicodeDecodeError` if the line is not a record.
    """
    record: Record = _decode(line)
    return record


class RequestIdentity(NamedTuple):
    """The request and the proxy of a decision. Units: `at_s` since the epoch."""

    at_s: float
    id: str
    gateway: str
    model: str
    key: str
    region: str = ""
    worker: int = 0


def record_decision(
    identity: RequestIdentity,
    considered: ConsideredDecision,
    request: ScheduleRequest,
    tried: Collection[int],
    chosen: str,
) -> RecordedDecision:
    """The record of a scheduler's last decision.

    Cost: with its line 6 µs with three candidates, 15 µs with sixteen.
    """
    candidates, decision = considered.candidates, considered.decision
    names = {candidate.slot: candidate.name for candidate in candidates}
    return RecordedDecision(
        **identity._asdict(),
        prompt_tokens=request.shape.prompt_tokens,
        output_tokens=request.shape.output_tokens,
        waited_s=request.waited_s,
        target_s=considered.target_s,
        priority=int(request.priority),
        preferred=[names[slot] for slot in request.preferred if slot in names],
        load=recorded_load(candidates, considered.load),
        turn=recorded_turn(candidates, considered.turn),
        tried=[names[slot] for slot in tried if slot in names],
        order=[candidate.name for candidate in decision.order] if isinstance(decision, Decision) else [],
        chosen=chosen,
    )


def recorded_load(candidates: Sequence[Candidate], load: Load) -> dict[str, RecordedCandidate]:
    """The states of the candidates, by name."""
    recorded = {}
    for candidate in candidates:
        state = load[candidate.slot]
        prediction = state.prediction
        fit = None
        if prediction is not None:
            fit = (prediction.ttft_s, prediction.tpot_s, prediction.late, prediction.delays_others)
        in_flight, limit = state.in_flight, state.limit
        if state.paused:
            in_flight, limit = in_flight + PAUSED_IN_FLIGHT, max(1, limit)
        recorded[candidate.name] = RecordedCandidate(
            in_flight, state.health, limit, state.units, fit, state.warm, state.usd, state.places
        )
    return recorded


def recorded_turn(candidates: Sequence[Candidate], turn: Turn) -> dict[str, float]:
    """The strategy's memory, by name."""
    return {candidate.name: turn[candidate.slot] for candidate in candidates if candidate.slot in turn}


def replay_decision(
    record: RecordedDecision, model_route: ModelRoute, turn: Mapping[str, float] | None = None
) -> Decision | Rejection:
    """Take the decision again in a route of any configuration; Deployments that the record lacks are excluded.

    Shape: `turn` replaces that of the record.
    """
    turns = record.turn if turn is None else turn
    known = tuple(candidate for candidate in model_route.candidates if candidate.name in record.load)
    if not known:
        reasons = tuple((candidate.name, "not in the record") for candidate in model_route.candidates)
        return Rejection(RejectionReason.NONE_UP, reasons)
    load = {candidate.slot: _state(record.load[candidate.name]) for candidate in known}
    known_turn = {candidate.slot: turns[candidate.name] for candidate in known if candidate.name in turns}
    tried = [candidate.slot for candidate in known if candidate.name in record.tried]
    return route(msgspec.structs.replace(model_route, candidates=known), load, known_turn, tried)


def chosen_deployment(record: RecordedDecision, decision: Decision | Rejection) -> str:
    """The Deployment that takes the request if no other request is quicker; empty if none does."""
    if isinstance(decision, Rejection):
        return ""
    slots = {candidate.name: candidate.slot for candidate in decision.order}
    for candidate in preferred_first(decision.order, [slots[name] for name in record.preferred if name in slots]):
        state = record.load[candidate.name]
        limit = limit_for_priority(record.priority, state.limit)
        late = state.fit is not None and state.fit[2]
        if not late and (not limit or state.in_flight < limit):
            return candidate.name
    return ""


def is_same_decision(record: RecordedDecision, decision: Decision | Rejection) -> bool:
    """Whether a decision equals the recorded one: the same order, and the recorded choice is part of it, or empty.

    The choice need not be the first of the order: another worker may have taken the last capacity there in between.
    """
    order = [candidate.name for candidate in decision.order] if isinstance(decision, Decision) else []
    return order == record.order and (record.chosen in order or not record.chosen)


def missed_slo(record: RecordedDecision, chosen: str, tpot_s: float) -> bool | None:
    """Whether a choice was predicted to miss its targets; None if no Profile predicts.

    Units: `tpot_s` is the TPOT target; the TTFT target is in the record.
    """
    if not chosen:
        return True
    fit = record.load[chosen].fit
    if fit is None:
        return None
    return bool(fit[2]) or record.waited_s + fit[0] > record.target_s or fit[1] > tpot_s


def _state(recorded: RecordedCandidate) -> CandidateState:
    prediction = None
    if recorded.fit is not None:
        ttft_s, tpot_s, late, delays_others = recorded.fit
        prediction = LatencyPrediction(-1, ttft_s, tpot_s, 0.0, 0.0, late, delays_others)
    paused = recorded.in_flight >= PAUSED_IN_FLIGHT
    return CandidateState(
        recorded.in_flight - PAUSED_IN_FLIGHT if paused else recorded.in_flight,
        recorded.health,
        recorded.limit,
        recorded.units,
        prediction,
        recorded.warm,
        recorded.usd,
        recorded.places,
        paused,
    )
