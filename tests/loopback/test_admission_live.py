"""Places and turns on real sockets: never one too many, none kept, and equal turns for unequal appetites."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from pathlib import Path

from fleetgate.core.admission.work_ledger import WORK_CELLS, WorkCell
from fleetgate.core.model import Profile, Slo
from tests.loopback.capacity_rig import Outcome, Shape, engines, refusals, send
from tests.loopback.engines import metric
from tests.loopback.rig import Rig
from tests.loopback.rig import deployment as snapshot_deployment
from tests.loopback.rig import gateway as snapshot_gateway
from tests.loopback.test_capacity_predicted import engine_at
from tests.loopback.up_rig import Up, deployment, free_port, gateway
from tests.waiting import wait_for

LIMIT = 8
PICKS = 10_000
CLIENTS = 48


async def ask_on(port: int, count: int, statuses: Counter[int]) -> None:
    """Requests one after the other on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = b'{"model":"m","messages":[{"role":"user","content":"Hello"}],"max_tokens":1}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    request = b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body)
    for _ in range(count):
        writer.write(request)
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        statuses[int(answer.split(b" ", 2)[1])] += 1
        length = next(line for line in answer.split(b"\r\n") if line.startswith(b"content-length: "))
        await reader.readexactly(int(length[16:]))
    writer.close()


def test_ten_thousand_picks_of_two_workers_never_exceed_a_typed_limit(tmp_path: Path) -> None:
    # An engine with just as many places and no queue counts every request that is one too many.
    options = f"--prefill-tokens-per-s 20000 --decode-base-s 0 --slots {LIMIT} --queue-max 0".split()
    with engines(options) as (url,):
        documents = [deployment("a", url, capacity={"concurrency": LIMIT}), gateway("chat", "a")]
        with Up(tmp_path, documents, "--auth", "none") as up:
            statuses: Counter[int] = Counter()

            async def all_of_them() -> None:
                each = PICKS // CLIENTS + 1
                await asyncio.gather(*(ask_on(up.port, each, statuses) for _ in range(CLIENTS)))

            asyncio.run(all_of_them())
        refused = refusals(url)
    assert statuses.total() >= PICKS and set(statuses) == {200}, statuses
    assert refused == 0, "the engine saw more requests at once than were typed"


def test_nothing_is_held_after_random_disconnects_and_engine_kills(tmp_path: Path) -> None:
    profile = Profile(name="p", prefill_tokens_per_s=4000.0, base_s=0.01, per_sequence_s=0.001)
    options = ["--prefill-tokens-per-s", "4000", "--decode-base-s", "0.01", "--decode-per-sequence-s", "0.001"]
    ports, slots, dice = [free_port(), free_port()], (1, 2), random.Random(7)
    made = tuple(
        snapshot_deployment(name, port, slot, profile=profile, engine="vllm")
        for name, port, slot in zip("ab", ports, slots, strict=True)
    )
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second, Rig(tmp_path, workers=2) as rig:
        for port, stack in zip(ports, (first, second), strict=True):
            stack.enter_context(engine_at(port, *options))
        strategy = {"strategy": "capacity_round_robin", "slo": Slo()}
        rig.publish(deployments=made, gateways=(snapshot_gateway("a", "b", **strategy),))
        rig.wait_until_used()
        board = rig.board

        async def storm() -> list[Outcome]:
            tasks = []
            for number in range(400):
                gives_up_s = dice.choice((0.0, dice.uniform(0.001, 0.5)))
                shape = Shape(dice.randint(10, 800), dice.randint(1, 40), hangs_up_after_s=gives_up_s)
                tasks.append(asyncio.create_task(send(rig.port, shape, number)))
                await asyncio.sleep(0.008)
                if number == 150:
                    assert board.in_flight_total(2) and board.milliunits_total(2), "something is held to be given back"
                    await asyncio.to_thread(second.close)
                if number == 250:
                    await asyncio.to_thread(second.enter_context, engine_at(ports[1], *options))
                if number == 350:
                    await asyncio.to_thread(first.close)
            return list(await asyncio.gather(*tasks))

        outcomes = asyncio.run(storm())
        wait_for(lambda: all(board.in_flight_total(slot) == 0 for slot in slots) and board.waiting_total(0) == 0)
        assert sum(each.status == 200 for each in outcomes) > 20
        held = (WorkCell.PENDING_TOKENS, WorkCell.SEQUENCES, WorkCell.KV_TOKENS)
        assert {board.work_total(slot, cell) for slot in slots for cell in held} == {0}
        assert {board.milliunits_total(slot) for slot in slots} == {0}
        cells = {board.work[at + cell] for at in range(0, len(board.work), WORK_CELLS) for cell in held}
        assert cells == {0}, "not even in the cells of one worker, with another's below zero"


def test_two_keys_are_served_alike_while_both_wait_although_one_asks_ten_times_as_much(tmp_path: Path) -> None:
    options = ["--prefill-tokens-per-s", "0", "--decode-base-s", "0.02", "--slots", "4"]
    with engines(options) as (url,):
        chat = gateway("chat", "a", admission={"queue_max": 60})
        with Up(tmp_path, [deployment("a", url, capacity={"concurrency": 4}), chat]) as up:
            keys = {up.new_key("eager"): 160, up.new_key("modest"): 16}
            until_s = time.monotonic() + 4.5
            begun_s = time.monotonic() + 1.5

            async def go_on(key: str) -> list[Outcome]:
                outcomes: list[Outcome] = []
                while time.monotonic() < until_s:
                    outcomes.append(await send(up.port, Shape(10, 5, key=key, hangs_up_after_s=9.0), len(outcomes)))
                    if outcomes[-1].status == 429:
                        await asyncio.sleep(0.2)
                return outcomes

            async def both() -> list[Outcome]:
                loops = [go_on(key) for key, count in keys.items() for _ in range(count)]
                return [outcome for outcomes in await asyncio.gather(*loops) for outcome in outcomes]

            outcomes = asyncio.run(both())
            assert metric(url, "vllm:num_requests_waiting") == 0
    steady = [each for each in outcomes if each.status == 200 and begun_s <= each.ended_s <= until_s]
    served = list(Counter(each.key for each in steady).values())
    jain = sum(served) ** 2 / (len(keys) * sum(count * count for count in served))
    print(f"served {served}, Jain {jain:.3f}")
    assert any(each.code == "queue_full" for each in outcomes), "one of them alone could fill the row"
    assert sum(served) > 50 and jain > 0.9
