"""Room by prediction on real sockets: what is refused, who waits where, and what a slow-down changes."""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.loopback.capacity_rig import Outcome, Shape, engines, events, offer, scrape, value, watch
from tests.loopback.engines import metric
from tests.loopback.up_rig import Up, deployment, free_port, gateway
from tests.waiting import wait_for

PREFILL_PER_S, BASE_S, PER_SEQUENCE_S = 4000, 0.02, 0.002
SPEEDS = ("--prefill-tokens-per-s", str(PREFILL_PER_S), "--decode-base-s", str(BASE_S))
OPTIONS = (*SPEEDS, "--decode-per-sequence-s", str(PER_SEQUENCE_S))
SLO = {"ttft_s": 0.5, "ttft_s_per_1k_tokens": 0.0, "tpot_s": 0.05}
PROFILE = {
    "kind": "Profile",
    "name": "p",
    "model": "m",
    "sku": "X",
    "accelerators_per_replica": 1,
    "engine": "vllm",
    "prefill_tokens_per_s": PREFILL_PER_S,
    "decode_step": {"base_s": BASE_S, "per_sequence_s": PER_SEQUENCE_S},
    "batch_max": 16,
}
SHAPE = Shape(prompt_tokens=200, output_tokens=30)
TTFT_SLACK_S = 0.5  # machines that run tests are shared
# At a TPOT of 0.05 s fifteen run at once, and each takes thirty steps.
TAKES_PER_S = 15 / (SHAPE.output_tokens * 0.05)


def overload(up: Up, url: str) -> tuple[list[Outcome], list[float]]:
    """Twice what it takes for some seconds: the outcomes, and how many waited in the engine."""

    async def both() -> tuple[list[Outcome], list[float]]:
        load = asyncio.create_task(offer(up.port, [SHAPE], 2 * TAKES_PER_S, 4.0))
        waiting = await watch(lambda: metric(url, "vllm:num_requests_waiting"), 0.2, load)
        return await load, waiting

    return asyncio.run(both())


def test_overload_is_refused_at_the_door_and_never_waits_in_the_engine(tmp_path: Path) -> None:
    with engines((*OPTIONS, "--slots", "16")) as (url,):
        predicted = [PROFILE, deployment("a", url, profile="p"), gateway("chat", "a", slo=SLO)]
        with Up(tmp_path, predicted, "--auth", "none") as up:
            outcomes, waiting = overload(up, url)
            wait_for(lambda: value(scrape(up), "fleetgate_in_flight") == 0)
            series = scrape(up)
            (tmp_path / "other").mkdir()
        served = [each for each in outcomes if each.status == 200]
        refused = [each for each in outcomes if each.status != 200]
        assert len(served) > 0.25 * len(outcomes) and len(refused) > 0.25 * len(outcomes)
        assert {(each.status, each.code) for each in refused} == {(429, "capacity_exhausted")}
        assert all(int(each.retry_after) >= 1 for each in refused)
        assert max(each.took_s for each in refused) < SLO["ttft_s"] + TTFT_SLACK_S, "at once, or when it would be late"
        kept = sum(each.ttft_s <= SLO["ttft_s"] for each in served) / len(served)
        print(f"served {len(served)}, refused {len(refused)}, TTFT kept by {kept:.0%}, waiting at most {max(waiting)}")
        assert kept > 0.7
        assert sum(each > 1 for each in waiting) <= 0.1 * len(waiting), "requests wait here, never in an engine"
        assert value(series, "fleetgate_ttft_prediction_error_seconds_count") == len(served)
        assert 0.5 < value(series, "fleetgate_margin", deployment="a") < 1.5
        assert value(series, "fleetgate_estimated_tokens_total", kind="prompt") > 0
        assert value(series, "fleetgate_token_error_total", kind="output") >= 0
        assert value(series, "fleetgate_units_in_flight") == value(series, "fleetgate_work_tokens") == 0

        unpredicted = [deployment("a", url), gateway("chat", "a", slo=SLO)]
        with Up(tmp_path / "other", unpredicted, "--auth", "none") as up:
            _, waiting_without = overload(up, url)
    print(f"without a Profile at most {max(waiting_without)} waited")
    assert max(waiting_without) > max(5.0, 2 * max(waiting)), "without prediction the same load piles up in the engine"


def test_a_client_that_cannot_wait_so_long_is_refused_at_once(tmp_path: Path) -> None:
    long = Shape(prompt_tokens=20, output_tokens=100)  # 2 s
    with engines((*SPEEDS, "--slots", "2")) as (url,):
        documents = [deployment("a", url, capacity={"concurrency": 2}), gateway("chat", "a")]
        # One worker: in another one, without a row of its own, a newcomer may find a place that has just come free.
        with Up(tmp_path, documents, "--auth", "none", "--workers", "1") as up:

            async def tell() -> list[Outcome]:
                await offer(up.port, [long], 20.0, 0.2)  # its drain rate is known now
                waiting = asyncio.create_task(offer(up.port, [long], 40.0, 0.4))
                await asyncio.sleep(1.0)
                hasty = await offer(up.port, [Shape(long.prompt_tokens, 10, timeout_ms=1500)], 50.0, 0.2)
                waiting.cancel()
                return hasty

            hasty = asyncio.run(tell())
    refused = [each for each in hasty if each.status == 429]
    print([(each.status, round(each.took_s, 2)) for each in hasty])
    assert len(refused) == len(hasty) and {each.code for each in refused} == {"capacity_exhausted"}
    assert max(each.took_s for each in refused) < 1.0, "it would only wait in vain, and is told so before its end"


@contextlib.contextmanager
def engine_at(port: int, *options: str) -> Iterator[None]:
    """An engine at a port, so that another may follow it there; it is killed in the middle of whatever it does."""
    argv = [sys.executable, "-m", "fleetgate.engine", "--listen", f"127.0.0.1:{port}", "--model", "m"]
    process = subprocess.Popen([*argv, *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("listening")
    try:
        yield
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


def test_an_engine_that_silently_becomes_half_as_fast_is_given_less(tmp_path: Path) -> None:
    port, short = free_port(), Shape(prompt_tokens=50, output_tokens=SHAPE.output_tokens)
    documents: list[dict[str, Any]] = [
        {**PROFILE, "concurrency": 16},  # so that prediction binds, not the limit
        deployment("a", f"http://127.0.0.1:{port}/v1", profile="p"),
        gateway("chat", "a", slo=SLO),
    ]
    with Up(tmp_path, documents, "--auth", "none") as up:

        def load(for_s: float) -> float:
            """The mean in flight over the last two seconds of a load that is too much."""

            async def both() -> list[float]:
                task = asyncio.create_task(offer(up.port, [short], 2 * TAKES_PER_S, for_s))
                await asyncio.sleep(for_s - 2.0)
                seen = []
                for _ in range(10):
                    seen.append(value(await asyncio.to_thread(scrape, up), "fleetgate_in_flight"))
                    await asyncio.sleep(0.15)
                await task
                return seen

            seen = asyncio.run(both())
            return sum(seen) / len(seen)

        with engine_at(port, *OPTIONS, "--slots", "16"):
            before = load(3.0)
            units = value(scrape(up), "fleetgate_units", deployment="a")
        slow = ("--prefill-tokens-per-s", "2000", "--decode-base-s", "0.04", "--decode-per-sequence-s", "0.004")
        with engine_at(port, *slow, "--slots", "16"):
            after = load(9.0)
            units_slow = value(scrape(up), "fleetgate_units", deployment="a")
            told = events(up, "a")
    print(f"in flight {before:.1f}, then {after:.1f}; CU {units:.2f}, then {units_slow:.2f}; {told}")
    assert after < 0.8 * before
    assert units_slow < 0.75 * units, "the metric tells"
