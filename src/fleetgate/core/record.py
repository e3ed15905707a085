"""Decisions as they were taken, so that they can be taken again: under the same rules, or under others.

A record names Deployments, not slots, because slots differ from one configuration to the next.
"""

from collections.abc import Mapping, Sequence

import msgspec

from fleetgate.core.forecast import Fit
from fleetgate.core.route import Decision, Lane, NoPlace, Rejection, route
from fleetgate.core.strategies import Candidate, Load, Standing, Turn


class Stood(msgspec.Struct, frozen=True, array_like=True):
    """How one candidate stood. Shape: `fit` is TTFT and TPOT in seconds, then why it would be late, if so."""

    in_flight: int
    health: float
    limit: int
    units: float
    fit: tuple[float, float, str] | None = None
    warm: float = 0.0
    usd: float = 0.0


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """One decision: what was known, and what was decided.

    Units: `at_s` since the epoch; `chosen` is empty for a rejection, `order` then too.
    """

    at_s: float
    gateway: str
    model: str
    key: str
    prompt_tokens: float
    output_tokens: float
    load: dict[str, Stood]
    turn: dict[str, float]
    tried: list[str]
    order: list[str]
    chosen: str


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Recorded).decode


def line_of(record: Recorded) -> bytes:
    """A record as one line of JSON."""
    return _encode(record) + b"\n"


def read_line(line: bytes) -> Recorded:
    """The record of a line.

    Raises: `msgspec.DecodeError` or `msgspec.ValidationError` when it is not one.
    """
    return _decode(line)


def stood_of(candidates: Sequence[Candidate], load: Load) -> dict[str, Stood]:
    """How the candidates stood, by name."""
    found = {}
    for candidate in candidates:
        in_flight, health, limit, units, fit, warm, usd = msgspec.structs.astuple(load[candidate.slot])
        short = None if fit is None else (fit.ttft_s, fit.tpot_s, fit.late)
        found[candidate.name] = Stood(in_flight, health, limit, units, short, warm, usd)
    return found


def turn_of(candidates: Sequence[Candidate], turn: Turn) -> dict[str, float]:
    """What the strategy remembered, by name."""
    return {candidate.name: turn[candidate.slot] for candidate in candidates if candidate.slot in turn}


def decide_again(record: Recorded, lane: Lane) -> Decision | Rejection:
    """Take the decision again in a Lane of any configuration; Deployments that were not there then are left out."""
    known = tuple(candidate for candidate in lane.candidates if candidate.name in record.load)
    if not known:
        return Rejection(NoPlace.NONE_UP, tuple((c.name, "not there when this was recorded") for c in lane.candidates))
    load = {candidate.slot: _standing(record.load[candidate.name]) for candidate in known}
    turn = {c.slot: record.turn[c.name] for c in known if c.name in record.turn}
    tried = [candidate.slot for candidate in known if candidate.name in record.tried]
    return route(msgspec.structs.replace(lane, candidates=known), load, turn, tried)


def same(record: Recorded, again: Decision | Rejection) -> bool:
    """Whether a decision came out as it was recorded."""
    order = [candidate.name for candidate in again.order] if isinstance(again, Decision) else []
    return order == record.order


def missed(record: Recorded, chosen: str, targets: Mapping[str, float]) -> bool:
    """Whether a choice was predicted to miss its SLO. Units: `targets` are `ttft_s` and `tpot_s`."""
    stood = record.load.get(chosen)
    if stood is None or stood.fit is None:
        return stood is None
    ttft_s, tpot_s, late = stood.fit
    return bool(late) or ttft_s > targets["ttft_s"] or tpot_s > targets["tpot_s"]


def _standing(stood: Stood) -> Standing:
    fit = None if stood.fit is None else Fit(-1, stood.fit[0], stood.fit[1], 0.0, 0.0, stood.fit[2])
    return Standing(stood.in_flight, stood.health, stood.limit, stood.units, fit, stood.warm, stood.usd)
