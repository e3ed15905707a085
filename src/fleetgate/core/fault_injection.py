"""Faults that an operator injects on purpose: which requests they strike, and when they end."""

from collections.abc import Iterable
from enum import StrEnum

import msgspec

DURATION_S_MAX = 3_600.0  # who wants more asks again: a forgotten fault must end while somebody remembers it
WATCH_TIMEOUT_S = 5.0  # a fault with an SLO to watch ends when nobody has watched for so long
REQUESTS_MIN = 20  # fewer say nothing about a share


class FaultKind(StrEnum):
    """What happens to a request that is struck, at its Deployment's door."""

    DELAY = "delay"  # it is sent so much later
    ERROR = "error"  # it is answered with an error status instead
    CUT = "cut"  # its answer is reset in the middle
    STALL = "stall"  # its answer stops coming in the middle, and the connection stays
    REFUSE = "refuse"  # its connection is refused


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One injected fault.

    Units: `share` of a Deployment's requests, 0 to 1; `begins_s` and `ends_s` seconds since the epoch; `delay_s` for
    `delay`; `status` for `error`; `stop_below_slo` the share of requests inside the SLO under which it ends, 0 for
    none.
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
    """All faults of a machine, as their file has them. `watched_s` is when their SLO was last looked at."""

    watched_s: float
    faults: tuple[Fault, ...] = ()


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(InjectedFaults).decode


def encode_injected(injected: InjectedFaults) -> bytes:
    """The bytes of the file."""
    return _encode(injected)


def decode_injected(data: bytes) -> InjectedFaults:
    """Read the file.

    Raises: `msgspec.ValidationError` or `msgspec.DecodeError`.
    """
    return _decode(data)


def active_faults(injected: InjectedFaults, now_s: float) -> tuple[Fault, ...]:
    """The faults that strike now, whatever has become of whoever asked for them."""
    return tuple(
        fault
        for fault in injected.faults
        if fault.begins_s <= now_s < min(fault.ends_s, fault.begins_s + DURATION_S_MAX)
        and (not fault.stop_below_slo or now_s - injected.watched_s < WATCH_TIMEOUT_S)
    )


def select_fault(faults: Iterable[Fault], entropy: float) -> Fault | None:
    """Which fault strikes a request, if any; shares of several add up. Units: `entropy` 0 to 1."""
    below = 0.0
    for fault in faults:
        below += fault.share
        if entropy < below:
            return fault
    return None


class SloObservation(msgspec.Struct, frozen=True):
    """How requests went since some moment. `late` ended well but missed a target; `lost` did not end well."""

    succeeded: int
    late: int
    failed: int

    @property
    def share_inside(self) -> float:
        """The share inside the SLO, 1 while nothing ended."""
        total = self.succeeded + self.failed
        return (self.succeeded - self.late) / total if total else 1.0


def violates_slo_bound(fault: Fault, seen: SloObservation) -> bool:
    """Whether the fault has done more harm than its bound allows."""
    if not fault.stop_below_slo or seen.succeeded + seen.failed < REQUESTS_MIN:
        return False
    return seen.share_inside < fault.stop_below_slo
