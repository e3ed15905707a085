"""A request is suspected only where nothing else can be the reason, and given up only after two deaths."""

from hypothesis import given
from hypothesis import strategies as st

from fleetgate.core.health.poison_request import TOGETHER_S, LostAttempt, is_poison, is_suspicious

losses = st.builds(LostAttempt, st.booleans(), st.integers(0, 5), st.booleans(), st.floats(0, 100))


@given(losses)
def test_what_may_have_another_reason_is_never_held_against_it(loss: LostAttempt) -> None:
    if is_suspicious(loss):
        assert loss.reset, "refusals, timeouts and error statuses never count"
        assert loss.served, "an engine that never answered anybody dies by itself"
        assert loss.others_waiting == 0 and loss.last_loss_age_s > TOGETHER_S, (
            "what hits several hits them for one reason"
        )


@given(st.integers(0, 10))
def test_one_death_is_chance(died: int) -> None:
    assert is_poison(died) == (died >= 2)
    assert is_suspicious(LostAttempt(True, 0, True, float("inf")))
