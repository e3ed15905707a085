"""`fleetgate simulate` on the command line: output, exit codes, messages."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fleetgate.cli.commands import app
from fleetgate.main import main as registers_every_command  # noqa: F401
from fleetgate.simulator.baselines.registry import BASELINES
from tests.scenarios.paper_fleets import trace

FLEET = """
kind: Profile
name: fast
model: llama
sku: H100-80GB
accelerators_per_replica: 8
engine: vllm
prefill_tokens_per_s: 15000
decode_step: {base_s: 0.028, per_sequence_s: 0.00035}
batch_max: 128
kv_tokens: 1200000
---
kind: Profile
name: slow
model: llama
sku: L40S
accelerators_per_replica: 4
engine: vllm
prefill_tokens_per_s: 3000
decode_step: {base_s: 0.04, per_sequence_s: 0.001}
---
kind: Secret
name: token
value_from: {env: THIS_IS_NOT_SET_ANYWHERE}
---
kind: Cluster
name: here
provider: local
region: eu-west
---
kind: Deployment
name: big
region: us-east
models: [{name: llama}]
engine: vllm
url: http://10.1.2.3:8000/v1
credential: {secret: token}
profile: fast
replicas: {committed: 2}
price: {usd_per_hour: 40}
---
kind: Deployment
name: small
cluster: here
models: [{name: llama}]
engine: vllm
workload: {command: [serve], port: 8000}
profile: slow
replicas: {committed: 3}
---
kind: Gateway
name: chat
domain: example.com
protocol: openai
strategy: overflow
upstreams: [{deployment: big}, {deployment: small}]
slo: {tpot_s: 0.08}
"""
KEYS = [
    "strategy",
    "load",
    "seed",
    "goodput_ratio",
    "slo_ttft_share",
    "slo_tpot_share",
    "ttft_p50_s",
    "ttft_p99_s",
    "shed_share",
    "overcommit_max",
    "spill_ratio",
    "cost_usd_per_mtok",
    "jain",
]
HEADER = "timestamp_s,prompt_tokens,output_tokens"


@pytest.fixture
def fleet_file(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.yaml"
    path.write_text(FLEET)
    return path


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv.gz"
    lines = [f"{a.at_s:.4f},{a.prompt_tokens},{a.output_tokens}" for a in trace(400)]
    path.write_bytes(gzip.compress("\n".join([HEADER, *lines, ""]).encode()))
    return path


def simulate(fleet_file: Path, trace_file: Path, *flags: str) -> Result:
    return CliRunner().invoke(app, ["simulate", "--fleet", str(fleet_file), "--trace", str(trace_file), *flags])


def test_json_has_one_object_a_strategy_and_nothing_else(fleet_file: Path, trace_file: Path) -> None:
    done = simulate(
        fleet_file,
        trace_file,
        "--load",
        "0.7",
        "--strategy",
        "overflow,round_robin",
        "--strategy",
        "clairvoyant",
        "-o",
        "json",
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [list(one) for one in found] == [KEYS] * 3
    assert [one["strategy"] for one in found] == ["overflow", "round_robin", "clairvoyant"]
    assert all(one["load"] == 0.7 and one["seed"] == 0 for one in found)
    assert all(0.0 < one["goodput_ratio"] <= 0.75 for one in found)


def test_the_gateways_own_strategy_is_the_default_and_the_table_shows_capacity_first(
    fleet_file: Path, trace_file: Path
) -> None:
    done = simulate(fleet_file, trace_file, "--rate", "2")
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["big", "us-east", "H100-80GB", "2"] in [line[:4] for line in lines]
    assert ["small", "eu-west"] in [line[:2] for line in lines]
    [small] = [line for line in lines if line[:1] == ["small"]]
    assert small[-2] == "3"  # a managed Deployment counts its desired replicas
    order = [line[0] for line in lines if line and line[0] in ("sum", "overflow")]
    assert order == ["sum", "overflow"]


def test_the_same_inputs_give_the_same_bytes_in_any_process(fleet_file: Path, trace_file: Path) -> None:
    flags = ["--load", "0.9", "--strategy", "overflow,least_cost,clairvoyant", "--region-phase", "us-east=0,eu-west=8"]
    flags += ["--proxies", "3", "--fault", "slow:big@60+60x2", "--seed", "7", "-o", "json"]
    outputs = [
        subprocess.run(
            [sys.executable, "-m", "fleetgate.main", "simulate", "--fleet", fleet_file, "--trace", trace_file, *flags],
            check=True,
            capture_output=True,
            env={**os.environ, "PYTHONHASHSEED": salt},
        ).stdout
        for salt in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert json.loads(outputs[0])[0]["seed"] == 7


def test_a_plot_is_drawn_in_both_formats_and_the_same_each_time(
    fleet_file: Path, trace_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    for name, begins in (("a.svg", b"<?xml"), ("b.svg", b"<?xml"), ("c.png", b"\x89PNG")):
        done = simulate(fleet_file, trace_file, "--load", "1", "--plot", str(tmp_path / name))
        assert done.exit_code == 0, done.output
        assert (tmp_path / name).read_bytes().startswith(begins)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_an_unknown_region_is_warned_about_once_and_not_in_the_json(fleet_file: Path, trace_file: Path) -> None:
    done = simulate(fleet_file, trace_file, "--region-phase", "us-east=0,mars=8", "--load", "0.5", "-o", "json")
    assert done.exit_code == 0, done.output
    assert done.stderr.count("'mars' is not known") == 1
    json.loads(done.stdout)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--strategy", "overfow"], "did you mean overflow?"),
        (["--fault", "slow:big@5"], "`slow` needs a factor"),
        (["--fault", "melt:big@5"], "slow:llama-us@300+150x3"),
        (["--fault", "down:nowhere@5"], "big, eu-west, small, us-east"),
        (["--load", "1", "--rate", "2"], "give one of them"),
        (["--load", "0"], "--load 0 is not a number above 0"),
        (["--load", "nan"], "--load nan is not a number above 0"),
        (["--proxies", "-1"], "--proxies -1 is below 0"),
        (["--region-phase", "us-east"], "is not REGION=HOURS"),
        (["--gateway", "talk"], "the fleet has: chat"),
        (["--plot", "picture.pdf"], "must end in .svg or .png"),
        (["--plot", "no/such/folder/picture.svg"], "there is no such folder"),
    ],
)
def test_wrong_usage_is_exit_2_and_one_message(
    fleet_file: Path, trace_file: Path, flags: list[str], sentence: str
) -> None:
    done = simulate(fleet_file, trace_file, *flags)
    assert done.exit_code == 2, done.output
    assert sentence in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "line 1: column timestamp_s is missing"),
        ("timestamp_s,prompt_tokens\n0,1\n", "line 1: column output_tokens is missing"),
        (f"{HEADER},colour\n0,1,1,red\n", "line 1: column 'colour' is not known"),
        (f"{HEADER}\n", "has no requests"),
        (f"{HEADER}\n0,1,1\n1,many,1\n", "line 3: prompt_tokens is 'many'; expected a number, 0 or more"),
        (f"{HEADER}\n0,1,1.5\n", "line 2: output_tokens is '1.5'; expected a whole number"),
        (f"{HEADER}\n0,1,-1\n", "line 2: output_tokens is '-1'; expected a number, 0 or more"),
        (f"{HEADER}\n5,1,1\n4,1,1\n", "line 3: timestamp_s 4.0 is before the line above"),
        (f"{HEADER}\n5,1\n", "line 2: 2 fields, but the header has 3"),
        (
            f"{HEADER},prefix_block_ids_512\n5,1,1,1 x\n",
            "line 2: prefix_block_ids_512 is '1 x'; expected whole numbers",
        ),
    ],
)
def test_a_bad_trace_is_exit_1_and_names_file_line_and_column(
    fleet_file: Path, tmp_path: Path, text: str, sentence: str
) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text(text)
    done = simulate(fleet_file, bad)
    assert done.exit_code == 1, done.output
    assert str(bad) in done.stderr
    assert sentence in done.stderr


def test_a_broken_archive_and_a_bad_fleet_are_reported(fleet_file: Path, trace_file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(trace_file.read_bytes()[:200])
    assert simulate(fleet_file, cut).exit_code == 1
    fleet_file.write_text(FLEET.replace("profile: slow", "profile: slo").replace("engine: vllm", "engine: vlm", 1))
    done = simulate(fleet_file, trace_file)
    assert done.exit_code == 1
    assert "did you mean `slow`?" in done.stderr and "engine" in done.stderr  # every mistake at once


def test_load_needs_a_trace_that_takes_time(fleet_file: Path, tmp_path: Path) -> None:
    once = tmp_path / "once.csv"
    once.write_text(f"{HEADER}\n3,100,10\n\n3,100,10\n")
    assert simulate(fleet_file, once, "--load", "1").exit_code == 1
    done = simulate(fleet_file, once, "-o", "json")
    assert done.exit_code == 0, done.output


def test_limit_takes_the_first_requests(fleet_file: Path, trace_file: Path) -> None:
    done = simulate(fleet_file, trace_file, "--limit", "50")
    assert done.stdout.startswith("50 requests")


def test_help_and_reference_name_every_column_and_strategy() -> None:
    shown = " ".join(CliRunner().invoke(app, ["simulate", "--help"], env={"COLUMNS": "200"}).stdout.split())
    reference = (Path(__file__).parents[2] / "docs" / "reference" / "simulate.md").read_text()
    for name in KEYS[3:]:
        assert name in shown
    for name in [*KEYS, *BASELINES]:
        assert f"`{name}`" in reference
    for name in BASELINES:
        assert name in shown
