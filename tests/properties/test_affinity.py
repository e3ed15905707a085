"""Prompts that begin alike are known again; the preference for where they went stays bounded."""

import json

from hypothesis import given
from hypothesis import strategies as st

from fleetgate.core.routing import strategies
from fleetgate.core.routing.prefix_affinity import PrefixAffinity
from fleetgate.core.routing.route import Decision, ModelRoute, route
from fleetgate.core.routing.strategies import NO_TURN, Candidate, CandidateState, Turn
from fleetgate.protocols.prompt_prefix import BLOCK_BYTES, BLOCKS_MAX, chain_of


def body_of(text: str, **fields: object) -> bytes:
    return json.dumps({**fields, "messages": [{"role": "user", "content": text}]}).encode()


@given(st.integers(0, 12_000), st.integers(0, 4000), st.integers(0, 4000))
def test_two_prompts_share_the_blocks_of_their_common_beginning(common: int, one: int, other: int) -> None:
    first = chain_of(body_of("a" * common + "b" * one, model="m", temperature=0.1))
    second = chain_of(body_of("a" * common + "c" * other, temperature=0.999, model="n"))
    shared = sum(1 for mine, theirs in zip(first, second, strict=False) if mine == theirs)
    assert all(mine == theirs for mine, theirs in zip(first[:shared], second[:shared], strict=True))
    whole_blocks = common // BLOCK_BYTES
    assert shared >= min(whole_blocks, len(first), len(second))
    if one and other:
        assert shared <= whole_blocks + 1


@given(st.binary(max_size=300_000), st.binary(max_size=40))
def test_any_body_has_a_bounded_chain(body: bytes, session: bytes) -> None:
    chain = chain_of(body, session)
    assert len(chain) <= BLOCKS_MAX + 1 and chain == chain_of(body, session)
    assert (len(chain) > 0 and chain[-1].endswith(session)) if session else True


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 10), st.integers(0, 9)), max_size=60))
def test_the_longest_beginning_that_went_somewhere_is_found(sent: list[tuple[int, int, int]]) -> None:
    """Chains are `family` × length, so the longest shared beginning is the shorter of the two lengths."""
    affinity, longest, where = PrefixAffinity(), dict[int, int](), dict[tuple[int, int], int]()
    for family, blocks, endpoint_slot in sent:
        chain = [(family, at) for at in range(blocks)]
        affinity.record(chain, endpoint_slot)
        longest[family] = max(longest.get(family, 0), blocks)
        where.update(dict.fromkeys(chain, endpoint_slot))
    for family in range(31):
        found = affinity.find([(family, at) for at in range(10)])
        assert found.blocks == longest.get(family, 0)
        if found.blocks:
            assert found.endpoint_slot == where[family, found.blocks - 1]


@given(st.lists(st.integers(0, 2), min_size=300, max_size=400), st.sampled_from([1.0, 2.0, 5.0]))
def test_round_robin_keeps_its_shares_whoever_is_warm(warm_at: list[int], big: float) -> None:
    """Affinity may shift turns in time, never the totals: it is paid for in credit."""
    made = tuple(Candidate(name=f"d{slot}", slot=slot) for slot in range(3))
    units, picks, turn = [1.0, 1.0, big], [0, 0, 0], NO_TURN
    for warm_slot in warm_at:
        load = {c.slot: CandidateState(0, 1.0, 0, units[c.slot], warm=float(c.slot == warm_slot)) for c in made}
        decision = route(ModelRoute(made, strategies.find("capacity_round_robin")), load, turn)
        assert isinstance(decision, Decision)
        turn = decision.turn
        picks[decision.order[0].slot] += 1
        assert all(abs(credit) < 4 for credit in turn.values())
    for slot, count in enumerate(picks):
        assert abs(count - len(warm_at) * units[slot] / sum(units)) <= 4


def test_overflow_prefers_who_is_warm_inside_a_rank_until_it_is_much_busier() -> None:
    made = tuple(Candidate(name=name, slot=slot, rank=1) for slot, name in enumerate("abc"))
    lane = ModelRoute((*made, Candidate(name="z", slot=3, rank=2)), strategies.find("overflow"))

    def first(in_flight: int, warm: float, elsewhere: float = 0.0) -> str:
        load = {slot: CandidateState(10, 1.0, 100) for slot in range(3)}
        load[2] = CandidateState(in_flight, 1.0, 100, warm=warm)
        load[3] = CandidateState(0, 1.0, 100, warm=elsewhere)
        turn: Turn = NO_TURN
        decision = route(lane, load, turn)
        assert isinstance(decision, Decision)
        return decision.order[0].name

    assert first(12, 1.0) == "c"
    assert first(12, 0.2) == "a"
    assert first(40, 1.0) == "a"
    assert first(10, 0.0, elsewhere=1.0) == "a", "never out of its rank"
