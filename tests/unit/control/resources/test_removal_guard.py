"""What a change takes away, and when that is asked about."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fleetgate.control.resources.removal_guard import CONFIRM_ENDPOINTS_MIN, CONFIRM_SHARE_MIN, removal_warning

Documents = dict[tuple[str, str], dict[str, Any]]


def fleet(endpoints: int, upstreams: tuple[str, ...] = ("a",), gateway: bool = True, **deployment: Any) -> Documents:
    made = {"urls": [f"http://10.0.0.{number}:8000/v1" for number in range(endpoints)], **deployment}
    documents: Documents = {("Deployment", "a"): made, ("Deployment", "b"): {"url": "http://10.1.0.1:8000/v1"}}
    if gateway:
        documents["Gateway", "chat"] = {"upstreams": [{"deployment": name} for name in upstreams]}
    return documents


@given(st.integers(1, 60), st.integers(1, 60))
def test_what_takes_ten_endpoints_and_more_than_three_in_ten_is_asked_about(before: int, after: int) -> None:
    gone = max(0, before - after)
    asked = removal_warning(fleet(before), fleet(after))
    assert bool(asked) == (gone >= CONFIRM_ENDPOINTS_MIN and gone > CONFIRM_SHARE_MIN * before)
    if asked:
        assert f"{gone} of {before} Endpoints" in asked and "--yes" in asked


def test_new_addresses_for_all_are_as_much_of_a_loss() -> None:
    moved = fleet(0, urls=[f"http://10.9.0.{number}:8000/v1" for number in range(12)])
    assert "12 of 12 Endpoints (100 %)" in removal_warning(fleet(12), moved)


def test_deployments_that_leave_their_gateway_count_though_they_stay() -> None:
    assert "12 of 13" in removal_warning(fleet(12, ("a", "b")), fleet(12, ("b",)))


def test_the_last_endpoint_of_a_gateway_is_asked_about() -> None:
    before = fleet(0, workload={"command": ["x"]}, replicas={"committed": 1})
    after = fleet(0, workload={"command": ["x"]}, replicas={"committed": 0})
    assert "leaves Gateway chat without an Endpoint" in removal_warning(before, after)
    assert not removal_warning(after, after), "it had none before"


def test_a_small_gateway_can_be_deleted_by_its_name() -> None:
    assert not removal_warning(fleet(3), fleet(3, gateway=False))
    assert removal_warning(fleet(30), fleet(30, gateway=False))


@given(st.integers(0, 60), st.integers(0, 30))
def test_growth_is_never_asked_about(before: int, more: int) -> None:
    assert not removal_warning(fleet(before), fleet(before + more))
