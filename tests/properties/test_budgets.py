"""Further attempts: a share of the requests, for a Gateway and for each key, whatever comes in whatever order."""

from hypothesis import given
from hypothesis import strategies as st

from fleetgate.core.admission.retry_budget import (
    RETRY_FLOOR_PER_S,
    SPREAD,
    TOKENS_MAX,
    KeyBudget,
    RetryBudget,
    jittered_s,
)
from fleetgate.core.exchange import AttemptFailed, Exchange, Failure, Pick, Picked, Refuse
from fleetgate.core.routing.strategies import Candidate

RATIO = 0.1
steps = st.lists(st.tuples(st.sampled_from(["request", "again", "take"]), st.floats(0, 0.5)), max_size=200)


@given(steps)
def test_never_more_than_the_share_and_the_floor(events: list[tuple[str, float]]) -> None:
    budget, now_s, requests, taken = RetryBudget(RATIO, 0.0), 0.0, 0, 0
    for kind, pause_s in events:
        now_s += pause_s
        if kind == "request":
            budget.record_request()
            requests += 1
        elif kind == "again":
            budget.record_client_retry()
        else:
            taken += budget.take(now_s)
    assert taken <= RATIO * requests + RETRY_FLOOR_PER_S * (1.0 + now_s) + 1e-6


@given(steps)
def test_a_clients_own_retries_never_leave_more(events: list[tuple[str, float]]) -> None:
    """The same story with and without them."""

    def taken(told: list[tuple[str, float]]) -> int:
        budget, now_s, count = RetryBudget(RATIO, 0.0), 0.0, 0
        for kind, pause_s in told:
            now_s += pause_s
            match kind:
                case "request":
                    budget.record_request()
                case "again":
                    budget.record_client_retry()
                case "take":
                    count += budget.take(now_s)
        return count

    without = [(kind if kind != "again" else "nothing", pause_s) for kind, pause_s in events]
    assert taken(events) <= taken(without)


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_a_key_that_spends_all_it_can_leaves_the_others_their_share(noisy: int, quiet: int) -> None:
    gateway = RetryBudget(RATIO, 0.0)
    loud, calm = (KeyBudget(gateway, RetryBudget(RATIO, 0.0)) for _ in range(2))
    for _ in range(noisy):
        loud.record_request()
    while loud.take(0.0):
        pass
    for _ in range(quiet):
        calm.record_request()
        assert not loud.take(0.0), "what others add is not its own"
    left = 0
    while calm.take(0.0):
        left += 1
    assert left >= min(TOKENS_MAX, RATIO * quiet) - 1 - 1e-6


def test_what_the_gateway_refuses_the_key_keeps() -> None:
    gateway = RetryBudget(0.0, 0.0)
    one, other = (KeyBudget(gateway, RetryBudget(0.0, 0.0)) for _ in range(2))
    while one.take(0.0):
        pass
    assert not other.take(0.0)
    assert sum(other.take(1.0) for _ in range(100)) == RETRY_FLOOR_PER_S


def test_clients_that_retry_by_themselves_are_tried_once_when_the_budget_is_gone() -> None:
    """The naive product of an SDK's three tries and a gateway's three: here it stays near one."""
    budget, attempts, requests = RetryBudget(RATIO, 0.0), 0, 1000
    for number in range(requests):
        exchange = Exchange(3, budget, client_retries=1 + number % 2)
        command: object = exchange.start()
        while not isinstance(command, Refuse):
            if isinstance(command, Pick):
                slot = len(command.tried)
                command = exchange.receive(Picked(Candidate(name=str(slot), slot=slot)), number / 1000)
            else:
                attempts += 1
                command = exchange.receive(AttemptFailed(Failure.BROKEN), number / 1000)
        assert command.should_retry is False
    assert attempts <= requests + 2 * RETRY_FLOOR_PER_S


@given(st.floats(0, 60), st.floats(0, 1))
def test_a_retry_after_is_spread_a_little(retry_after_s: float, entropy: float) -> None:
    assert abs(jittered_s(retry_after_s, entropy) - retry_after_s) <= SPREAD * retry_after_s + 1e-9
