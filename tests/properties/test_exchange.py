"""One request's life: every legal sequence of events ends, within its attempts, with exactly one answer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetgate.core.admission.retry_budget import RETRY_FLOOR_PER_S, RetryBudget
from fleetgate.core.exchange import (
    CLIENT_GONE,
    FINISHED,
    RESUMES_MAX,
    TRANSITIONS,
    AttemptFailed,
    CapacityFreed,
    Command,
    Commit,
    Content,
    Continue,
    Event,
    Exchange,
    Failure,
    Finish,
    IllegalTransition,
    Interrupt,
    NotPicked,
    Outcome,
    Pick,
    Picked,
    QueueFull,
    QueueTimeout,
    Refuse,
    Send,
    State,
    Wait,
    final_refusal,
)
from fleetgate.core.routing.route import RejectionReason
from fleetgate.core.routing.strategies import Candidate

DEPLOYMENTS = 6
failures = st.sampled_from([failure for failure in Failure if failure is not Failure.POISON])


def play(data: st.DataObject, exchange: Exchange) -> list[Command]:
    """A shell that answers every command with anything that may happen."""
    commands: list[Command] = [exchange.start()]
    while not isinstance(commands[-1], Refuse | Interrupt | Finish):
        choices: list[Event]
        match commands[-1]:
            case Pick(tried=tried):
                left = [slot for slot in range(DEPLOYMENTS) if slot not in tried]
                reasons = (RejectionReason.ALL_FULL, RejectionReason.ALL_TRIED if tried else RejectionReason.NONE_UP)
                choices = [*(Picked(Candidate(name=str(slot), slot=slot)) for slot in left), *map(NotPicked, reasons)]
            case Wait():
                choices = [QueueFull(), CapacityFreed(), QueueTimeout(2.0), CLIENT_GONE]
            case Send():
                lost = AttemptFailed(
                    data.draw(failures),
                    data.draw(st.booleans()),
                    data.draw(st.floats(0, 300)),
                    data.draw(st.booleans()),
                )
                choices = [lost, Content(200), Content(400), CLIENT_GONE]
            case _:
                choices = [
                    FINISHED,
                    AttemptFailed(Failure.BROKEN),
                    AttemptFailed(Failure.BROKEN, resumable=True),
                    CLIENT_GONE,
                ]
        event = data.draw(st.sampled_from(choices))
        commands.append(exchange.receive(event, 0.0))
    return commands


@given(st.data(), st.integers(1, 4))
def test_every_life_ends_once_and_within_its_attempts(data: st.DataObject, attempts_max: int) -> None:
    exchange = Exchange(attempts_max, RetryBudget(0.1, 0.0))
    commands = play(data, exchange)
    assert exchange.state is State.ENDED and exchange.outcome is not None
    sends = [command for command in commands if isinstance(command, Send)]
    assert len({send.candidate.slot for send in sends}) == len(sends), "a Deployment is not tried twice"
    assert exchange.attempts_sent <= attempts_max
    commits = [command for command in commands if isinstance(command, Commit)]
    assert len(commits) <= 1
    assert sum(isinstance(command, Continue) for command in commands) <= exchange.resumes <= RESUMES_MAX
    if commits:
        assert not isinstance(commands[-1], Refuse), "an answer that has begun cannot be taken back"
    if isinstance(commands[-1], Interrupt):
        assert commits
    with pytest.raises(IllegalTransition):
        exchange.receive(FINISHED, 0.0)


@given(st.lists(st.builds(AttemptFailed, failures, st.booleans(), st.floats(0, 1000)), min_size=1), st.integers(0, 3))
def test_the_verdict_is_one_that_sdks_handle_well(failed: list[AttemptFailed], retries: int) -> None:
    refusal = final_refusal(tuple(failed), retries)
    assert refusal.status in (404, 429, 502, 503, 504)
    assert refusal.retry_after_s <= 60, "official SDKs do not wait longer than 120 s"
    assert refusal.status != 401, "an upstream's refusal of our credential is not the client's"
    if refusal.should_retry:
        assert retries == 0, "an SDK that is already retrying is not asked for more"
    if any(f.failure is Failure.FULL for f in failed):
        assert refusal.status == 429


def test_answers_that_break_off_one_after_the_other_do_not_multiply() -> None:
    """The first resume of each is free, the second comes out of the budget."""
    budget, attempts, requests = RetryBudget(0.1, 0.0), 0, 1000
    for number in range(requests):
        exchange = Exchange(3, budget)
        command: Command = exchange.start()
        while not isinstance(command, Interrupt):
            if isinstance(command, Pick):
                slot = len(command.tried)
                command = exchange.receive(Picked(Candidate(name=str(slot), slot=slot)), number / 1000)
            elif isinstance(command, Send):
                attempts += 1
                command = exchange.receive(Content(200), number / 1000)
            else:
                command = exchange.receive(AttemptFailed(Failure.BROKEN, resumable=True), number / 1000)
        assert exchange.outcome is Outcome.INTERRUPTED
    assert attempts <= 2 * requests + 0.1 * requests + 2 * RETRY_FLOOR_PER_S


def test_a_total_outage_is_not_multiplied() -> None:
    """Every attempt fails: beyond the first move of each request, only the budget's share is spent."""
    budget, attempts, requests = RetryBudget(0.1, 0.0), 0, 1000
    for number in range(requests):
        exchange = Exchange(3, budget)
        command: Command = exchange.start()
        while not isinstance(command, Refuse):
            if isinstance(command, Pick):
                slot = len(command.tried)
                command = exchange.receive(Picked(Candidate(name=str(slot), slot=slot)), number / 1000)
            else:
                attempts += 1
                command = exchange.receive(AttemptFailed(Failure.BROKEN), number / 1000)
    assert attempts <= 2 * requests + 0.1 * requests + 2 * RETRY_FLOOR_PER_S


def test_every_move_of_the_table_is_reachable() -> None:
    seen: set[tuple[State, type]] = set()

    class Watched(Exchange):
        def receive(self, event, now_s):  # type: ignore[no-untyped-def]
            seen.add((self.state, type(event)))
            return super().receive(event, now_s)

    @settings(max_examples=1000, derandomize=True)  # each move is rare; which are tried must not depend on luck
    @given(st.data())
    def explore(data: st.DataObject) -> None:
        play(data, Watched(3, RetryBudget(0.1, 0.0)))

    explore()
    assert seen == set(TRANSITIONS) - {
        (State.PICKING, type(CLIENT_GONE))
    }  # a client can leave there only between two calls


def test_the_outcome_of_an_error_that_is_the_clients() -> None:
    exchange = Exchange(3, RetryBudget(0.1, 0.0))
    exchange.start()
    exchange.receive(Picked(Candidate(name="a", slot=0)), 0.0)
    exchange.receive(Content(400), 0.0)
    exchange.receive(FINISHED, 0.0)
    assert exchange.outcome is Outcome.CLIENT_ERROR
