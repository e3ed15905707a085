"""Faults that an operator injects on purpose: which requests they affect, and when they end."""

from collections.abc import Iterable
from enum import StrEnum

import msgspec

DURATION_S_MAX = 3_600.0  # a forgotten fault ends by itself; a longer one is injected again
WATCH_TIMEOUT_S = 5.0  # a fault with an SLO bound ends if the SLO was not checked for so long
REQUESTS_MIN = 20  # fewer say nothing about a share


class FaultKind(StrEnum):
    """What happens to an affected request, as if its Deployment did it."""

    DELAY = "delay"  # it is sent later
    ERROR = "error"  # it is answered with an error status instead
    CUT = "cut"  # its response is reset in the middle
    STALL = "stall"  # its response stops in the middle, and the connection stays open
    REFUSE = "refuse"  # its connection is refused


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One injected fault.

    Units: `share` of a Deployment's requests, 0 to 1; `begins_s` and `ends_s` seconds since the epoch;
    `stop_below_slo` is the share of requests within the SLO below which it ends, 0 for no bound.
    Shape: `delay_s` is used by `delay`, `status` by `error`.
    """

    name: str
    kind: FaultKind
    deployment: str
    share: float
    begins_s: float
    ends_s: float
    stop_below_slo: float = 0.0
    delay_s: float = 2.0
    status: int = 503


class InjectedFaults(msgspec.Struct, frozen=True, kw_only=True):
    """All faults of a machine, as in their file.

    Units: `watched_s` is when their SLO was last checked, seconds since the epoch.
    """

    watched_s: float
    faults: tuple[Fault, ...] = ()


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(InjectedFaults).decode


def encode_injected(injected: InjectedFaults) -> bytes:
    """The bytes of the fault file."""
    return _encode(injected)


def decode_injected(data: bytes) -> InjectedFaults:
    """Read the fault file.

    Raises: `msgspec.ValidationError` or `msgspec.DecodeError` if the bytes are not one.
    """
    return _decode(data)


def active_faults(injected: InjectedFaults, now_s: float) -> tuple[Fault, ...]:
    """The faults that are active now, even if the process that injected them is gone."""
    return tuple(
        fault
        for fault in injected.faults
        if fault.begins_s <= now_s < min(fault.ends_s, fault.begins_s + DURATION_S_MAX)
        and (not fault.stop_below_slo or now_s - injected.watched_s < WATCH_TIMEOUT_S)
    )


def select_fault(faults: Iterable[Fault], entropy: float) -> Fault | None:
    """The fault that affects a request, if any; the shares of several faults add up. Units: `entropy` 0 to 1."""
    share = 0.0
    for fault in faults:
        share += fault.share
        if entropy < share:
            return fault
    return None


class SloObservation(msgspec.Struct, frozen=True):
    """How requests ended since a moment. Shape: `late` are those of `succeeded` that missed a target."""

    succeeded: int
    late: int
    failed: int

    @property
    def share_inside(self) -> float:
        """The share of requests within the SLO, 1 if none ended."""
        total = self.succeeded + self.failed
        return (self.succeeded - self.late) / total if total else 1.0


def violates_slo_bound(fault: Fault, observed: SloObservation) -> bool:
    """Whether fewer requests are within the SLO than the fault's bound allows."""
    if not fault.stop_below_slo or observed.succeeded + observed.failed < REQUESTS_MIN:
        return False
    return observed.share_inside < fault.stop_below_slo
