"""`up --record` under concurrent load, then `fleetgate replay`: the same decisions, or a list of those that differ."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.loopback.capacity_rig import Outcome, Shape, engines, send
from tests.loopback.up_rig import Up, deployment, free_port, gateway, run

WAVES = (
    (8, 24),
    (18, 8),
)  # clients, and requests of each, for 12 slots: first a choice, then often no capacity
REQUESTS = sum(clients * each for clients, each in WAVES)
SPEEDS = [  # prompt tokens/s, seconds of a step
    ("--prefill-tokens-per-s", "20000", "--decode-base-s", "0.002"),
    ("--prefill-tokens-per-s", "8000", "--decode-base-s", "0.004"),
    ("--prefill-tokens-per-s", "3000", "--decode-base-s", "0.008"),
]
HOME = "region-b"
SECRET = "a-prompt-that-must-not-be-recorded"
Documents = list[dict[str, Any]]


def profile(name: str, prefill: float, base_s: float) -> dict[str, Any]:
    """A Profile with the true speed of an engine of `SPEEDS`."""
    return {
        "kind": "Profile",
        "name": name,
        "model": "m",
        "sku": f"sku-{name}",
        "accelerators_per_replica": 1,
        "engine": "vllm",
        "prefill_tokens_per_s": prefill,
        "decode_step": {"base_s": base_s, "per_sequence_s": 0.0002},
        "batch_max": 4,
    }


def counted(urls: list[str], strategy: str) -> Documents:
    """Deployments with configured limits that are full at times, of two ranks; one of them is dead."""
    made = [
        deployment(name, url, capacity={"concurrency": 4, "units": units})
        for name, url, units in zip("abc", urls, (8.0, 3.0, 1.0), strict=True)
    ]
    made.append(deployment("dead", f"http://127.0.0.1:{free_port()}/v1", capacity={"concurrency": 4, "units": 8.0}))
    ranks = {"a": 1, "b": 2, "c": 2, "dead": 1}
    upstreams = [{"deployment": name, "rank": rank} for name, rank in ranks.items()]
    return [*made, gateway("chat", *ranks, strategy=strategy, upstreams=upstreams)]


def predicted(urls: list[str], strategy: str) -> Documents:
    """Deployments with Profiles and prices, an SLO, and a policy with a preference."""
    speeds = [(20000.0, 0.002), (8000.0, 0.004), (3000.0, 0.008)]
    profiles = [profile(f"p-{name}", *speed) for name, speed in zip("abc", speeds, strict=True)]
    made = [
        deployment(name, url, profile=f"p-{name}", price={"usd_per_mtok_input": usd, "usd_per_mtok_output": 4 * usd})
        for name, url, usd in zip("abc", urls, (3.0, 1.0, 0.2), strict=True)
    ]
    upstreams = [{"deployment": name, "rank": 1} for name in "abc"]
    prefer = {"name": "long", "when": "request.prompt_tokens > 200", "prefer": ["b"]}
    require = {"name": "short", "when": "request.prompt_tokens < 80", "require": 'deployment.name != "a"'}
    slo = {"ttft_s": 0.5, "tpot_s": 0.05}
    chat = gateway("chat", "a", "b", "c", strategy=strategy, upstreams=upstreams, slo=slo, policies=[prefer, require])
    return [*profiles, *made, chat]


def record(folder: Path, documents: Callable[[list[str]], Documents]) -> tuple[Path, Path, list[Outcome], str]:
    """Serve a few hundred requests, many at once; returns records, fleet file, outcomes and the key."""
    path = folder / "records.jsonl"
    with engines(*SPEEDS) as urls, Up(folder, documents(urls), "--record", str(path), "--region", HOME) as up:
        key = up.new_key("laptop")
        shapes = [Shape(size, 6, key=key) for size in (40, 80, 200)]

        async def send_each(client: int, count: int) -> list[Outcome]:
            return [await send(up.port, shapes[(client + n) % 3], client * 1000 + n) for n in range(count)]

        async def all_clients() -> list[Outcome]:
            waves = [
                await asyncio.gather(*(send_each(client, each) for client in range(clients))) for clients, each in WAVES
            ]
            return [outcome for wave in waves for outcomes in wave for outcome in outcomes]

        outcomes = asyncio.run(all_clients())
        assert up.ask(key, messages=[{"role": "user", "content": SECRET}]).status_code == 200
    return path, up.config, outcomes, key


def replay(path: Path, fleet: Path, *flags: str) -> dict[str, Any]:
    """The report of `replay -o json`."""
    done = run("replay", str(path), "--fleet", str(fleet), "-o", "json", *flags)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def changed(fleet: Path, to: Path, **fields: Any) -> Path:
    """The fleet file with other fields in its Gateway."""
    documents = list(yaml.safe_load_all(fleet.read_text()))
    documents[-1].update(fields)
    to.write_text(yaml.safe_dump_all(documents))
    return to


@pytest.mark.parametrize("documents", [counted, predicted])
@pytest.mark.parametrize("strategy", ["overflow", "capacity_round_robin", "least_cost"])
def test_recorded_decisions_are_reproduced_and_another_fleet_changes_them(
    tmp_path: Path, documents: Callable[[list[str], str], Documents], strategy: str
) -> None:
    path, fleet, outcomes, key = record(tmp_path, lambda urls: documents(urls, strategy))
    text = path.read_text()
    assert SECRET not in text and key not in text and "laptop" in text

    lines = [json.loads(line) for line in text.splitlines()]
    ended = Counter(line["deployment"] for line in lines if line["record"] == "ended" and line["outcome"] == "ok")
    served = Counter(each.deployment for each in outcomes if each.status == 200)
    assert served.total() > REQUESTS / 2
    assert ended.total() == served.total() + 1 and not served - ended  # one more: the request with the secret

    found = replay(path, fleet)
    assert list(found) == [
        "decisions", "reproduced", "reproduced_share", "outrun", "broken_lines", "differences", "against",
    ]  # fmt: skip
    print(f"{found['decisions']} decisions, {found['reproduced_share']:.4%} reproduced, {found['outrun']} outrun")
    assert found["decisions"] >= len(outcomes)
    assert found["reproduced_share"] >= 0.999, found["differences"][:3]
    choices = sum(line["record"] == "decision" and len(line["order"]) > 1 for line in lines)
    full = sum(line["record"] == "decision" and not line["order"] for line in lines)
    assert choices > REQUESTS / 4 and full > 0, (choices, full)
    assert found["against"] is None and found["broken_lines"] == 0

    if strategy == "overflow" and documents is counted:  # the one with Deployments of one rank in several regions
        elsewhere = replay(path, fleet, "--region", "region-c")
        assert elsewhere["reproduced_share"] < 0.95, "without the flag, the region of each record counts"
    unchanged = replay(path, fleet, "--against", str(fleet))["against"]
    assert unchanged["changed_share"] <= 0.001, unchanged
    assert all(pair["before"] == pair["after"] for pair in unchanged["requests"].values())
    other = [{"deployment": "c", "rank": 1}, {"deployment": "b", "rank": 2}, {"deployment": "a", "rank": 3}]
    turned = changed(fleet, tmp_path / "turned.yaml", upstreams=other, strategy="overflow")
    against = replay(path, fleet, "--against", str(turned))["against"]
    assert against["changed"] > choices / 4
    moved = {name: pair["after"] - pair["before"] for name, pair in against["requests"].items()}
    assert moved["c"] > 0 > moved["a"]
    assert {name: pair["before"] for name, pair in against["requests"].items() if name in "abc"} == dict(ended)
    if documents is predicted:
        usd = against["usd_per_request"]
        assert usd["after"] < usd["before"]  # c is the cheapest
        [pair] = against["simulated"]
        assert pair["requests"] == sum(line["record"] == "ended" for line in lines)
        assert pair["after"]["strategy"] == "overflow" and pair["before"]["strategy"] == strategy
        assert pair["after"] != pair["before"] and all(pair[side]["goodput_rps"] > 0.0 for side in ("before", "after"))
        assert any(line.get("preferred") for line in lines) and any("a" not in line.get("load", "a") for line in lines)
    else:
        assert any(line.get("tried") for line in lines)
        assert against["usd_per_request"] == {"before": None, "after": None}
        assert not against["simulated"] and "has no Profile" in against["not_simulated"][0]


def test_an_edited_record_is_reported(tmp_path: Path) -> None:
    path, fleet, _, _ = record(tmp_path, lambda urls: counted(urls, "capacity_round_robin"))
    lines = path.read_text().splitlines()
    edited = 0
    for number, line in enumerate(lines):
        decision = json.loads(line)
        if decision["record"] == "decision" and len(decision["order"]) > 1 and edited < 20:
            decision["turn"][decision["order"][-1]] = 1e6
            lines[number] = json.dumps(decision)
            edited += 1
    assert edited == 20
    path.write_text("\n".join([*lines[:-1], lines[-1][:30], "not json", ""]))
    done = run("replay", str(path), "--fleet", str(fleet))
    assert f"{path} line {len(lines)} is not a record" in done.stderr and "line" in done.stdout
    found = replay(path, fleet)
    assert found["broken_lines"] == 2
    assert found["decisions"] - found["reproduced"] == 20 == len(found["differences"])
    assert all("turn" in each["because"] for each in found["differences"])


def test_what_cannot_be_replayed_is_an_error(tmp_path: Path) -> None:
    fleet, records = tmp_path / "fleet.yaml", tmp_path / "records.jsonl"
    fleet.write_text(yaml.safe_dump_all([deployment("a", "http://127.0.0.1:1/v1"), gateway("chat", "a")]))
    records.write_text("nothing\n")
    done = run("replay", str(records), "--fleet", str(fleet))
    assert done.returncode == 1 and "line 1 is not a record" in done.stderr and "--record FILE" in done.stderr
    assert run("replay", str(tmp_path / "none"), "--fleet", str(fleet)).returncode == 2
    fleet.write_text(yaml.safe_dump_all([gateway("chat", "a", strategy="overfow")]))
    wrong = run("replay", str(records), "--fleet", str(fleet))
    assert wrong.returncode == 1 and str(fleet) in wrong.stderr and "overfow" in wrong.stderr
