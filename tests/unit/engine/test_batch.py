"""The batch of the simulated engine: slots, queue, prefill and decode steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetgate.engine.batch import NEVER_S, Batch, Speeds, TokenSequence

SPEEDS = st.builds(
    Speeds,
    prefill_tokens_per_s=st.sampled_from([0.0, 100.0, 5000.0]),
    decode_base_s=st.sampled_from([0.0, 0.01, 0.25]),
    decode_per_sequence_s=st.sampled_from([0.0, 0.001]),
)
SEQUENCES = st.lists(st.tuples(st.integers(1, 500), st.integers(1, 20)), min_size=1, max_size=20)


def run_to_end(batch: Batch[TokenSequence], now_s: float) -> float:
    """Advance from token to token until no sequence is left; returns the time."""
    while (next_s := batch.next_s) != NEVER_S:
        now_s = next_s
        batch.advance(now_s)
    return now_s


@given(SPEEDS, SEQUENCES, st.integers(1, 4))
def test_every_sequence_gets_exactly_its_tokens(speeds: Speeds, shapes: list[tuple[int, int]], slots: int) -> None:
    batch: Batch[TokenSequence] = Batch(speeds, slots, queue_max=len(shapes))
    sequences = [TokenSequence(prompt, output) for prompt, output in shapes]
    for sequence in sequences:
        assert batch.submit(sequence, 0.0)
        assert batch.running <= slots
    run_to_end(batch, 0.0)
    assert [sequence.made for sequence in sequences] == [output for _, output in shapes]
    assert batch.running == batch.waiting == batch.kv_tokens == 0
    assert batch.output_tokens_total == sum(output for _, output in shapes)
    assert batch.prompt_tokens_total == sum(prompt for prompt, _ in shapes)


@given(SPEEDS, SEQUENCES, st.integers(1, 4), st.data())
def test_cancelling_at_any_time_frees_everything(
    speeds: Speeds, shapes: list[tuple[int, int]], slots: int, data: st.DataObject
) -> None:
    batch: Batch[TokenSequence] = Batch(speeds, slots, queue_max=len(shapes))
    sequences = [TokenSequence(prompt, output) for prompt, output in shapes]
    now_s = 0.0
    for sequence in sequences:
        batch.submit(sequence, now_s)
    cancelled = data.draw(st.lists(st.sampled_from(sequences), max_size=len(sequences)))
    for sequence in cancelled:
        now_s += data.draw(st.sampled_from([0.0, 0.004, 0.3]))
        batch.advance(now_s)
        batch.cancel(sequence, now_s)
        assert batch.running == min(slots, batch.running + batch.waiting)
    run_to_end(batch, now_s)
    assert batch.running == batch.waiting == 0
    assert all(sequence.finished for sequence in sequences if sequence not in cancelled)


@given(SPEEDS, SEQUENCES, st.integers(1, 4), st.floats(0.0, 5.0))
def test_the_number_of_advances_changes_nothing(
    speeds: Speeds, shapes: list[tuple[int, int]], slots: int, until_s: float
) -> None:
    made = []
    for times_s in ([until_s], [until_s * part / 7 for part in range(1, 8)]):
        batch: Batch[TokenSequence] = Batch(speeds, slots, queue_max=len(shapes))
        sequences = [TokenSequence(prompt, output) for prompt, output in shapes]
        for sequence in sequences:
            batch.submit(sequence, 0.0)
        for now_s in [*times_s, until_s]:
            batch.advance(now_s)
        made.append([sequence.made for sequence in sequences])
    assert made[0] == made[1]


def test_prefills_run_in_turn_then_steps_of_the_whole_batch() -> None:
    batch: Batch[TokenSequence] = Batch(
        Speeds(prefill_tokens_per_s=1000, decode_base_s=0.1, decode_per_sequence_s=0.01), 8, 0
    )
    first, second = TokenSequence(500, 3), TokenSequence(1000, 1)
    batch.submit(first, 0.0)
    batch.submit(second, 0.0)
    assert batch.advance(0.49) == []
    assert batch.advance(0.5) == [first]
    assert batch.next_s == pytest.approx(0.61)
    assert run_to_end(batch, 0.5) == pytest.approx(1.5)  # the second prompt's prefill comes after the first's
    assert (first.made, second.made) == (3, 1)


def test_a_full_queue_refuses() -> None:
    batch: Batch[TokenSequence] = Batch(Speeds(decode_base_s=1.0), slots=1, queue_max=1)
    running, waiting, refused = (TokenSequence(1, 5) for _ in range(3))
    assert batch.submit(running, 0.0)
    assert batch.submit(waiting, 0.0)
    assert not batch.submit(refused, 0.0)
    batch.cancel(running, 0.0)
    assert (batch.running, batch.waiting) == (1, 0)


def test_a_cancelled_prefill_lets_the_next_one_start_earlier() -> None:
    batch: Batch[TokenSequence] = Batch(Speeds(prefill_tokens_per_s=100), slots=4, queue_max=0)
    first, second, third = TokenSequence(100, 1), TokenSequence(100, 1), TokenSequence(100, 1)
    for sequence in (first, second, third):
        batch.submit(sequence, 0.0)
    batch.cancel(second, 0.5)
    assert batch.advance(2.0) == [first, third]
