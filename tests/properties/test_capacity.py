"""Capacity units, forecasts and books: the arithmetic that unlike GPUs are compared by."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetgate.core.admission.ledger import Ledger, SettledTwice
from fleetgate.core.admission.work_ledger import TokenWork, WorkLedger, WorkReservation
from fleetgate.core.capacity import units as capacity
from fleetgate.core.capacity.deployment_view import Corrections, current_profile
from fleetgate.core.capacity.latency_model import NOMINAL_SPEED, RequestShape, SpeedFactor, idle_ttft_s, predict
from fleetgate.core.capacity.online_estimate import OnlineEstimate
from fleetgate.core.model import Deployment, Endpoint, Profile, Slo
from fleetgate.ipc.shared_memory import SharedMemory

PROFILES = st.builds(
    Profile,
    name=st.just("p"),
    prefill_tokens_per_s=st.floats(200, 60_000),
    base_s=st.floats(0.001, 0.08),
    per_sequence_s=st.floats(0, 0.005),
    batch_max=st.integers(1, 512),
    kv_tokens=st.one_of(st.just(0), st.integers(5_000, 2_000_000)),
)
TPOT = st.floats(0.02, 0.2)
DESIGN_EXAMPLE = Profile(
    name="llama-70b-h100x8",
    prefill_tokens_per_s=15_000,
    base_s=0.028,
    per_sequence_s=0.00035,
    batch_max=128,
    kv_tokens=1_200_000,
)


def test_the_worked_example() -> None:
    """The Profile that the reference shows: 3.2 CU, 32 in flight at the knee, and what follows from them."""
    assert capacity.units_of(DESIGN_EXAMPLE, 0.05) == pytest.approx(3.22, abs=0.01)
    assert capacity.knee_of(DESIGN_EXAMPLE, 0.05) == pytest.approx(32.4, abs=0.1)
    assert capacity.limit_of(DESIGN_EXAMPLE, 0.05, 4) == 116
    assert capacity.batch_within(DESIGN_EXAMPLE, 0.05) == pytest.approx(62.9, abs=0.1)
    assert capacity.output_weight(DESIGN_EXAMPLE, 0.05) == pytest.approx(11.9, abs=0.1)


@given(PROFILES, TPOT)
def test_the_reference_request_costs_one_unit(profile: Profile, tpot_s: float) -> None:
    assert capacity.cost_units(profile, tpot_s, 1000, 200) == pytest.approx(1.0)
    assert capacity.units_of(profile, tpot_s) > 0
    assert capacity.limit_of(profile, tpot_s, 3) >= 3


@given(PROFILES, st.floats(0.5, 50), st.floats(0.3, 3))
def test_units_that_an_operator_wrote_hold_and_move_only_with_the_pace(
    profile: Profile, written: float, slowness: float
) -> None:
    endpoint = Endpoint(slot=0, scheme="http", host="h", port=1, base_path="/v1", engines=2)
    fields = {"slot": 0, "name": "d", "region": "r", "engine": "vllm", "models": {"m": "m"}, "endpoints": (endpoint,)}
    typed = OnlineEstimate(Deployment(**fields, profile=profile, units=written), Slo())  # type: ignore[arg-type]
    derived = OnlineEstimate(Deployment(**fields, profile=profile, units=0.0), Slo())  # type: ignore[arg-type]
    assert typed.units == pytest.approx(written)
    assert derived.units == pytest.approx(2 * capacity.units_of(profile, Slo().tpot_s))
    for estimate in (typed, derived):
        estimate.speed.factor = SpeedFactor(slowness, slowness)
    assert typed.units / written == pytest.approx(derived.units / (2 * capacity.units_of(profile, Slo().tpot_s)))


@given(PROFILES, TPOT, st.floats(1, 50_000), st.floats(0, 5_000), st.floats(0, 1))
def test_more_work_never_costs_less_and_cached_tokens_are_free(
    profile: Profile, tpot_s: float, prompt: float, output: float, cached: float
) -> None:
    cost = capacity.cost_units(profile, tpot_s, prompt, output)
    assert capacity.cost_units(profile, tpot_s, prompt * (1 - cached), output) <= cost
    assert capacity.cost_units(profile, tpot_s, 0, output) == pytest.approx(
        cost - capacity.cost_units(profile, tpot_s, prompt, 0), abs=1e-6 * max(1.0, cost)
    )


@given(PROFILES, TPOT, st.floats(1.1, 8.0))
def test_an_engine_that_is_so_many_times_as_fast_never_has_less(profile: Profile, tpot_s: float, times: float) -> None:
    faster = Profile(
        name="f",
        prefill_tokens_per_s=profile.prefill_tokens_per_s * times,
        base_s=profile.base_s / times,
        per_sequence_s=profile.per_sequence_s / times,
        batch_max=profile.batch_max,
        kv_tokens=profile.kv_tokens,
    )
    assert capacity.units_of(faster, tpot_s) >= capacity.units_of(profile, tpot_s) * 0.999


@given(PROFILES, st.floats(1, 20_000), st.integers(0, 200), st.floats(0, 50_000), st.floats(0.5, 3))
def test_a_busier_or_slower_replica_never_promises_more(
    profile: Profile, prompt: float, sequences: int, pending: float, slowness: float
) -> None:
    need, speed = RequestShape(prompt, 200.0), current_profile(profile, Slo(), Corrections(NOMINAL_SPEED, 1.0), 0.0)
    idle = predict(need, speed, 0, 1.0, TokenWork())
    busy = predict(need, speed, 0, 1.0, TokenWork(pending, sequences, 0))
    assert idle.ttft_s == pytest.approx(idle_ttft_s(speed, prompt))
    assert busy.ttft_s >= idle.ttft_s and busy.tpot_s >= idle.tpot_s
    slow = current_profile(profile, Slo(), Corrections(SpeedFactor(1 + slowness, 1 + slowness), 1.0), 0.0)
    slower = predict(need, slow, 0, 1.0, TokenWork(pending, sequences, 0))
    assert slower.ttft_s > busy.ttft_s and slower.tpot_s > busy.tpot_s


@given(PROFILES, st.floats(1, 20_000))
def test_an_idle_replica_has_room_for_whatever_its_ttft_allows(profile: Profile, prompt: float) -> None:
    """Nothing is refused for size or slowness alone."""
    speed = current_profile(profile, Slo(), Corrections(NOMINAL_SPEED, 0.85), 0.0)
    target_s = capacity.ttft_target_s(Slo(), prompt, idle_ttft_s(speed, prompt))
    assert not predict(RequestShape(prompt, 200.0, target_s), speed, 0, 1.0, TokenWork()).late


@given(st.floats(1, 200_000), st.integers(0, 8))
def test_no_prompt_is_too_long_for_a_replica_that_decodes_with_time_to_spare(prompt: float, sequences: int) -> None:
    """It waits for a moment without prompts ahead of it, never for an idle replica, which under load never comes."""
    speed = current_profile(DESIGN_EXAMPLE, Slo(), Corrections(NOMINAL_SPEED, 1.0), 0.0)
    need = RequestShape(prompt, 200.0, float("inf"))
    assert not predict(need, speed, 0, 1.0, TokenWork(0, sequences, 0)).late


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9000), st.booleans()), max_size=40),
    st.randoms(use_true_random=False),
)
def test_books_return_to_zero_on_every_path(requests: list[tuple[int, int, bool]], random) -> None:  # type: ignore[no-untyped-def]
    board = SharedMemory(memoryview(bytearray(SharedMemory.bytes_needed(2))), 2)
    hands = [WorkLedger(board, worker, Ledger(board, worker)) for worker in (0, 1)]
    held: list[tuple[WorkLedger, WorkReservation]] = []
    for at, (endpoint, tokens, first) in enumerate(requests):
        books = hands[at % 2]
        hold = WorkReservation(1, endpoint, tokens, tokens + 100, 1000)
        if books.reserve(hold, 15, float(at)):
            held.append((books, books.first_token(hold, at + 0.5) if first else hold))
        assert len(held) <= 15
        assert board.in_flight_total(1) == len(held)
        if len(held) > 8:
            books, hold = held.pop(random.randrange(len(held)))
            books.settle(hold)
    total = sum(hands[0].work_at(endpoint, 1e-4, 9.0, 0.0).sequences for endpoint in range(4))
    assert total == len(held)
    for books, hold in held:
        books.settle(hold)
    assert all(hands[1].work_at(endpoint, 1e-4, 9.0, 99.0)[:3] == (0, 0, 0) for endpoint in range(4))
    assert sum(board.milliunits) == 0 and board.in_flight_total(1) == 0
    with pytest.raises(SettledTwice):
        hands[0].settle(WorkReservation(1, 0))


def test_a_dead_workers_token_work_is_swept() -> None:
    board = SharedMemory(memoryview(bytearray(SharedMemory.bytes_needed(2))), 2)
    dead = WorkLedger(board, 1, Ledger(board, 1))
    assert dead.reserve(WorkReservation(3, 7, 500, 700, 1500), 0, 0.0)
    assert board.clear_worker(1) == 1
    assert dead.work_at(7, 1e-4, 9.0, 0.0)[:3] == (0, 0, 0)
    assert sum(board.milliunits) == 0
