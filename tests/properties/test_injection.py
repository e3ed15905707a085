"""Injected faults: whom they strike, and that they always end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetgate.core.fault_injection import (
    DURATION_S_MAX,
    REQUESTS_MIN,
    WATCH_TIMEOUT_S,
    Fault,
    FaultKind,
    InjectedFaults,
    SloObservation,
    active_faults,
    decode_injected,
    encode_injected,
    select_fault,
    violates_slo_bound,
)

SHARES = st.floats(0.001, 1.0)
TIMES = st.floats(0.0, 4e9)


def fault(share: float = 0.1, begins_s: float = 100.0, ends_s: float = 160.0, bound: float = 0.0) -> Fault:
    return Fault(
        name="f",
        kind=FaultKind.CUT,
        deployment="d",
        share=share,
        begins_s=begins_s,
        ends_s=ends_s,
        stop_below_slo=bound,
    )


@given(SHARES, st.integers(1, 200))
def test_a_fault_strikes_its_share(share: float, grid: int) -> None:
    hits = sum(select_fault((fault(share),), (number + 0.5) / grid) is not None for number in range(grid))
    assert abs(hits - share * grid) <= 1


@given(st.lists(SHARES, max_size=4), st.floats(0.0, 0.999999))
def test_shares_of_several_add_up(shares: list[float], entropy: float) -> None:
    found = select_fault([fault(share) for share in shares], entropy)
    assert (found is not None) == (entropy < sum(shares))


@given(TIMES, st.floats(0.1, 1e9), TIMES, st.sampled_from([0.0, 0.9]), TIMES)
def test_every_fault_ends(begins_s: float, lasts_s: float, now_s: float, bound: float, watched_s: float) -> None:
    """Whoever wrote the file, with whatever times in it, and whether or not anybody lives to take it out."""
    one = fault(begins_s=begins_s, ends_s=begins_s + lasts_s, bound=bound)
    injected = InjectedFaults(watched_s=watched_s, faults=(one,))
    if active_faults(injected, now_s):
        assert begins_s <= now_s < begins_s + min(lasts_s, DURATION_S_MAX)
        assert not bound or now_s - watched_s < WATCH_TIMEOUT_S
    assert not active_faults(injected, begins_s + DURATION_S_MAX)


def test_one_with_a_bound_needs_a_watcher() -> None:
    injected = InjectedFaults(watched_s=100.0, faults=(fault(bound=0.9), fault()))
    assert len(active_faults(injected, 104.0)) == 2
    assert [one.stop_below_slo for one in active_faults(injected, 105.1)] == [0.0]


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100), st.floats(0.01, 1.0))
def test_it_stops_exactly_below_its_bound(inside: int, late: int, lost: int, bound: float) -> None:
    seen = SloObservation(inside + late, late, lost)
    total = inside + late + lost
    stops = violates_slo_bound(fault(bound=bound), seen)
    if total < REQUESTS_MIN:
        assert not stops
    else:
        assert stops == (inside / total < bound)
    assert not violates_slo_bound(fault(bound=0.0), seen)


@given(st.binary(max_size=200))
def test_a_damaged_file_is_no_file(data: bytes) -> None:
    whole = encode_injected(InjectedFaults(watched_s=1.0, faults=(fault(),)))
    assert decode_injected(whole).faults == (fault(),)
    with pytest.raises(ValueError, match=r".*"):
        decode_injected(data + b"x")
