"""The circuit breaker: what opens it, what closes it, and that it always gets another chance."""

from hypothesis import assume, given
from hypothesis import strategies as st

from fleetgate.core.health.circuit_breaker import (
    CONSECUTIVE_FAILURES_MAX,
    EJECTED_STATES,
    EJECTION_FIRST_S,
    EJECTION_MAX_S,
    FLAPPING_EJECTIONS,
    HEALTHY,
    JITTER,
    RECOVERY_SUCCESSES_MAX,
    STEADY_S,
    TRANSITIONS,
    BreakerState,
    EndpointHealth,
    Signal,
    current_state,
    ejection_end_ms,
    encode_ejection,
    health_from_ejection,
    next_health,
)

TOLD = [sign for sign in Signal if sign not in (Signal.MOSTLY_BROKE, Signal.BACK_OFF_OVER)]
signs = st.lists(st.tuples(st.sampled_from(TOLD), st.floats(0, 30)), max_size=40)


def play(events: list[tuple[Signal, float]], entropy: float = 0.5) -> tuple[EndpointHealth, float]:
    health, now_s = HEALTHY, 0.0
    for sign, pause_s in events:
        now_s += pause_s
        health = next_health(health, sign, now_s, entropy)
    return health, now_s


def out(cause: Signal, now_s: float = 0.0) -> EndpointHealth:
    """Taken out by one kind of sign."""
    return play([(cause, now_s), *[(cause, 0.0)] * (CONSECUTIVE_FAILURES_MAX - 1)])[0]


@given(signs, st.floats(0, 1))
def test_a_breaker_always_gets_another_chance(events: list[tuple[Signal, float]], entropy: float) -> None:
    health, now_s = play(events, entropy)
    assert health.open_until_s <= now_s + EJECTION_MAX_S
    later_s = now_s + EJECTION_MAX_S
    assert current_state(health, later_s) not in EJECTED_STATES
    for _ in range(RECOVERY_SUCCESSES_MAX):
        health = next_health(health, Signal.WENT_WELL, later_s)
    assert current_state(health, later_s) is BreakerState.CLOSED


@given(signs)
def test_every_change_is_a_move_of_the_table(events: list[tuple[Signal, float]]) -> None:
    health, now_s = HEALTHY, 0.0
    for sign, pause_s in events:
        now_s += pause_s
        before, health = current_state(health, now_s), next_health(health, sign, now_s)
        mostly = (before, Signal.MOSTLY_BROKE) if sign in (Signal.BROKE, Signal.UNREACHABLE) else (before, sign)
        moves = [TRANSITIONS[key] for key in {(before, sign), mostly} if key in TRANSITIONS]
        assert health.breaker is before or health.breaker in [move.to for move in moves]


def test_every_state_can_be_left_and_reached_and_a_state_that_is_out_ends_by_the_clock() -> None:
    assert {breaker for breaker, _ in TRANSITIONS} == set(BreakerState)
    assert {move.to for move in TRANSITIONS.values()} == set(BreakerState)
    assert all((breaker, Signal.BACK_OFF_OVER) in TRANSITIONS for breaker in EJECTED_STATES)
    assert all(
        move.to is not BreakerState.CLOSED for (_, sign), move in TRANSITIONS.items() if sign is not Signal.WENT_WELL
    )


@given(signs)
def test_probes_alone_never_close_an_open_breaker(events: list[tuple[Signal, float]]) -> None:
    """A probe proves the port, not the engine: traffic comes back through one real request."""
    health, now_s = play([*events, (Signal.DENIED, 0.0)])
    for _ in range(5):
        now_s += EJECTION_MAX_S
        health = next_health(health, Signal.PROBE_WELL, now_s)
    assert current_state(health, now_s) is BreakerState.HALF_OPEN


def test_a_probe_brings_back_only_whom_a_probe_or_a_refused_connection_took_out() -> None:
    for cause, back in (
        (Signal.UNREACHABLE, True),
        (Signal.PROBE_BROKE, True),
        (Signal.BROKE, False),
        (Signal.DENIED, False),
    ):
        health = next_health(out(cause), Signal.PROBE_WELL, 0.1)
        assert (health.breaker is BreakerState.HALF_OPEN) is back, cause
    crashed = next_health(out(Signal.BROKE), Signal.PROBE_BROKE, 0.1)
    assert next_health(crashed, Signal.PROBE_WELL, 0.2).breaker is BreakerState.HALF_OPEN


def test_probes_that_go_well_hide_no_requests_that_break() -> None:
    """One request in two seconds, each broken, between probes that are content."""
    health, _ = play(
        [(Signal.BROKE, 1.0), (Signal.PROBE_WELL, 0.5), (Signal.PROBE_WELL, 0.5)] * CONSECUTIVE_FAILURES_MAX
    )
    assert health.breaker is BreakerState.OPEN


def test_requests_that_go_well_outweigh_probes_that_break() -> None:
    health, _ = play([(Signal.PROBE_BROKE, 1.0), (Signal.PROBE_BROKE, 1.0), (Signal.WENT_WELL, 0.1)] * 10)
    assert health.breaker is BreakerState.CLOSED


@given(st.integers(1, 12), st.floats(0, 1))
def test_each_ejection_in_a_row_lasts_longer_up_to_a_minute(times: int, entropy: float) -> None:
    health, now_s, last_s = HEALTHY, 0.0, 0.0
    for _ in range(CONSECUTIVE_FAILURES_MAX):
        health = next_health(health, Signal.BROKE, now_s, entropy)
    for _ in range(times):
        pause_s = health.open_until_s - now_s
        assert (1 - JITTER) * EJECTION_FIRST_S <= pause_s + 1e-9 <= EJECTION_MAX_S + 1e-6 and pause_s >= last_s - 1e-9
        last_s, now_s = pause_s, health.open_until_s
        health = next_health(health, Signal.BROKE, now_s, entropy)


@given(st.integers(FLAPPING_EJECTIONS, 10))
def test_who_flaps_stays_out_longer_and_has_to_show_more(times: int) -> None:
    """Down and up every few seconds: its probes are not believed, and one good request is not enough."""
    health, now_s = HEALTHY, 0.0
    for _ in range(times):
        for _ in range(CONSECUTIVE_FAILURES_MAX):
            health = next_health(health, Signal.UNREACHABLE, now_s)
        assert health.breaker is BreakerState.DOWN
        believed = next_health(health, Signal.PROBE_WELL, now_s + 0.1).breaker is BreakerState.HALF_OPEN
        assert believed is (health.ejections < FLAPPING_EJECTIONS)
        now_s = health.open_until_s
        for _ in range(min(RECOVERY_SUCCESSES_MAX, health.ejections)):
            assert current_state(health, now_s) is BreakerState.HALF_OPEN
            health = next_health(health, Signal.WENT_WELL, now_s)
        assert health.breaker is BreakerState.CLOSED
    assert health.ejections == times
    steady_s = now_s + STEADY_S + 11.0
    assert next_health(health, Signal.WENT_WELL, steady_s) is HEALTHY, "who has been steady is as good as new"


def test_jitter_spreads_returns() -> None:
    pauses_s = {play([(Signal.BROKE, 0.0)] * 3, entropy)[0].open_until_s for entropy in (0.0, 0.25, 0.5, 0.75, 1.0)}
    assert len(pauses_s) == 5 and max(pauses_s) - min(pauses_s) <= 2.01 * JITTER * EJECTION_FIRST_S


def test_success_in_between_keeps_it_closed() -> None:
    health, _ = play([(Signal.BROKE, 0.1), (Signal.BROKE, 0.1), (Signal.WENT_WELL, 0.1)] * 5)
    assert health.breaker is BreakerState.CLOSED


def test_a_grey_failure_opens_it_although_some_get_through() -> None:
    """Two of three break, never three in a row: after twenty results it is out."""
    health, _ = play([(Signal.BROKE, 0.1), (Signal.BROKE, 0.1), (Signal.WENT_WELL, 0.1)] * 7)
    assert health.breaker is BreakerState.OPEN


@given(st.lists(st.booleans(), min_size=60, max_size=60))
def test_what_mostly_works_stays_in(broken: list[bool]) -> None:
    """Of ten results at most three break, and never three in a row."""
    events: list[tuple[Signal, float]] = []
    for at in range(0, 60, 10):
        ten = broken[at : at + 10]
        chosen = [n for n, bad in enumerate(ten) if bad][:3]
        chosen = [n for n in chosen if not {n - 1, n - 2} <= set(chosen)]
        events += [(Signal.BROKE if n in chosen else Signal.WENT_WELL, 0.2) for n in range(10)]
    assume(not any(all(sign is Signal.BROKE for sign, _ in events[n : n + 3]) for n in range(58)))
    assert play(events)[0].breaker is BreakerState.CLOSED


def test_what_broke_long_ago_is_forgotten() -> None:
    health, _ = play([(Signal.BROKE, 0.1), (Signal.WENT_WELL, 0.1), (Signal.WENT_WELL, 11.0)])
    assert health is HEALTHY


def test_a_suspect_of_a_lost_region_is_in_again_after_one_good_request() -> None:
    suspect = next_health(HEALTHY, Signal.REGION_LOST, 5.0)
    assert current_state(suspect, 5.0) is BreakerState.HALF_OPEN
    assert current_state(next_health(suspect, Signal.WENT_WELL, 6.0), 6.0) is BreakerState.CLOSED
    assert current_state(next_health(suspect, Signal.BROKE, 6.0), 6.0) is BreakerState.OPEN


def test_a_refused_credential_is_tried_again_only_by_the_clock_or_when_it_is_new() -> None:
    denied = next_health(HEALTHY, Signal.DENIED, 0.0)
    for sign in set(TOLD) - {Signal.NEW_CREDENTIAL}:
        assert next_health(denied, sign, 1.0).breaker is BreakerState.DENIED, sign
    assert next_health(denied, Signal.NEW_CREDENTIAL, 1.0).breaker is BreakerState.HALF_OPEN


@given(signs, st.floats(0, 1e6))
def test_what_other_workers_are_told_comes_out_as_it_was(events: list[tuple[Signal, float]], begun_s: float) -> None:
    health, _ = play([(Signal.PROBE_WELL, begun_s), *events])
    told = encode_ejection(health)
    if health.breaker in EJECTED_STATES:
        other = health_from_ejection(told)
        assert other.breaker is health.breaker and abs(other.open_until_s - health.open_until_s) < 0.002
        assert ejection_end_ms(told) == int(health.open_until_s * 1000)
    else:
        assert told == 0
