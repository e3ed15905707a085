"""Leases: never more than the limit, nothing in flight left uncovered, and the same division in any order."""

from hypothesis import given
from hypothesis import strategies as st

from fleetgate.core.admission.lease import LOST_SHARE, SLOTS_MIN, Lease, LeaseDemand, divide

NAMES = st.text(alphabet="abcdef", min_size=1, max_size=4)
WISHES = st.dictionaries(
    NAMES, st.builds(LeaseDemand, in_flight=st.integers(0, 50), demand=st.floats(0, 500)), min_size=1, max_size=8
)


@given(st.integers(1, 400), WISHES)
def test_the_sum_is_the_limit_or_what_is_in_flight_already(limit: int, wanted: dict[str, LeaseDemand]) -> None:
    slots = divide(limit, wanted)
    in_flight = sum(wish.in_flight for wish in wanted.values())
    assert sum(slots.values()) == max(limit, in_flight)
    assert all(slots[proxy] >= wish.in_flight for proxy, wish in wanted.items())


@given(st.integers(1, 400), WISHES, st.randoms(use_true_random=False))
def test_order_changes_nothing(limit: int, wanted: dict[str, LeaseDemand], random) -> None:  # type: ignore[no-untyped-def]
    mixed = list(wanted.items())
    random.shuffle(mixed)
    assert divide(limit, dict(mixed)) == divide(limit, wanted)


@given(st.integers(0, 12), st.integers(2, 6))
def test_every_proxy_can_start_one_request_where_there_is_enough(busy: int, proxies: int) -> None:
    wanted = {f"p{at}": LeaseDemand(0, 0.0) for at in range(proxies)} | {"busy": LeaseDemand(busy, 1000.0)}
    slots = divide(SLOTS_MIN * (proxies + 1) + busy, wanted)
    assert all(count >= 1 for count in slots.values())
    assert slots["busy"] == max(slots.values())


@given(st.integers(0, 100), st.floats(0, 1), st.floats(0, 100), st.floats(0, 100))
def test_a_lost_store_leaves_less_never_more(slots: int, share: float, until_s: float, now_s: float) -> None:
    lease = Lease(slots, share, until_s)
    used = lease.now(now_s)
    assert used.slots <= lease.slots
    assert (used == lease) == (now_s <= until_s) or used.slots == lease.slots == 0 or share == 0.0
    if now_s > until_s:
        assert used.slots >= int(LOST_SHARE * slots)
