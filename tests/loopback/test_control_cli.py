"""The CLI against a real API: what it prints, its exit codes, and never a trace."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fleetgate.core.api_keys import parse_key
from tests.loopback.control_rig import DEPLOYMENT, GATEWAY, ControlRig


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlRig]:
    with ControlRig(tmp_path_factory.mktemp("control") / "data") as rig:
        yield rig


def run(*words: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FLEETGATE_")}
    done = subprocess.run(
        [sys.executable, "-m", "fleetgate.cli.commands", *words],
        input=stdin,
        env={**clean, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done


def test_from_a_file_to_a_key_and_back(rig: ControlRig, tmp_path: Path) -> None:
    here = ("--data-dir", str(rig.data_dir))
    fleet = tmp_path / "fleet.yaml"
    secret = {"kind": "Secret", "name": "token", "value_from": {"env": "UPSTREAM_TOKEN"}}
    fleet.write_text(yaml.safe_dump_all([{**DEPLOYMENT, "credential": {"secret": "token"}}, GATEWAY, secret]))

    dry = run("apply", "-f", str(fleet), "--dry-run", *here, UPSTREAM_TOKEN="t0p")
    assert dry.stdout.splitlines()[0] == "Deployment/llama-us would be created"
    assert run("get", "deployments", "-o", "json", *here).stdout.strip() == "[]"
    applied = run("apply", "-f", str(fleet), *here, UPSTREAM_TOKEN="t0p")
    assert applied.returncode == 0, applied.stderr
    assert applied.stdout.splitlines() == [
        "Deployment/llama-us created",
        "Gateway/chat created",
        "Secret/token created",
    ]

    for word in ("gateways", "gateway", "Gateway", "GATEWAYS"):
        assert "chat.example.com" in run("get", word, *here).stdout
    shown = yaml.safe_load(run("get", "gateway", "chat", "-o", "yaml", *here).stdout)
    assert shown["upstreams"] == [{"deployment": "llama-us", "rank": 1}]
    again = run("apply", "-f", "-", *here, stdin=yaml.safe_dump(shown))
    assert again.stdout == "Gateway/chat unchanged\n"
    described = json.loads(run("describe", "deployment", "llama-us", "-o", "json", *here).stdout)
    assert described["now"]["limit"] == 0
    assert "created" in described["events"][0]["sentence"]
    assert "was created" in run("describe", "deployment", "llama-us", *here).stdout

    created = run(
        "keys", "create", "app", "--gateway", "chat", "--label", "team=a", "--expires", "30d", "-o", "json", *here
    )
    answer = json.loads(created.stdout)
    assert set(answer) == {"name", "key"}
    assert parse_key(answer["key"].encode()) is not None
    (key,) = rig.snapshot().keys
    assert (key.name, key.gateways, key.labels) == ("app", ("chat",), {"team": "a"})
    plain = run("keys", "create", "plain", *here).stdout.strip()
    assert parse_key(plain.encode()) is not None
    twice = run("keys", "create", "plain", *here)
    assert twice.returncode == 1
    assert "already exists" in twice.stderr

    used = run("delete", "deployment", "llama-us", *here)
    assert used.returncode == 1
    assert "Gateway/chat" in used.stderr
    for kind, name in (
        ("key", "app"),
        ("key", "plain"),
        ("gateway", "chat"),
        ("deployment", "llama-us"),
        ("secret", "token"),
    ):
        deleted = run("delete", kind, name, *here)
        assert deleted.returncode == 0, deleted.stderr
    assert rig.snapshot().keys == ()
    assert "was deleted" in run("get", "events", *here).stdout


def test_every_mistake_names_its_file(rig: ControlRig, tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(yaml.safe_dump({**DEPLOYMENT, "engine": "vlm"}))
    two.write_text(yaml.safe_dump({**GATEWAY, "strategy": "x", "upstreams": [{"deployment": "none"}]}))
    refused = run("apply", "-f", str(one), "-f", str(two), "--data-dir", str(rig.data_dir))
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert [line.split(": ")[:3] for line in refused.stderr.splitlines()] == [
        [str(one), "Deployment/llama-us", "engine"],
        [str(two), "Gateway/chat", "strategy"],
        [str(two), "Gateway/chat", "upstreams[0].deployment"],
    ]


def test_unreadable_files_are_told_without_asking_the_api(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [")
    done = run(
        "apply", "-f", str(tmp_path / "none.yaml"), "-f", str(tmp_path / "bad.yaml"), "--api", "http://127.0.0.1:1"
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "code", "has"),
    [
        (("get", "keys", "--api", "http://127.0.0.1:1", "--token", "x"), 1, "fleetgate up"),
        (("get", "keys", "--api", "nonsense", "--token", "x"), 1, "is not a URL"),
        (("get", "keys", "--data-dir", "/nowhere/at/all"), 1, "/nowhere/at/all"),
        (("get", "keyz", "--token", "x"), 2, "keys"),
        (("get",), 2, "KIND"),
        (("frobnicate",), 2, "frobnicate"),
        (("keys", "create", "a", "--label", "x", "--token", "x"), 2, "NAME=VALUE"),
        (("delete", "event", "1", "--token", "x"), 2, "Events"),
    ],
)
def test_what_cannot_be_done_is_one_clear_message(words: tuple[str, ...], code: int, has: str) -> None:
    done = run(*words, HOME="/nowhere")
    assert done.returncode == code, done.stderr
    assert has in done.stderr
    assert code == 2 or len(done.stderr.splitlines()) == 1


def test_flags_go_before_the_environment_and_the_wrong_token_is_told(rig: ControlRig) -> None:
    token = (rig.data_dir / "owner-token").read_text().strip()
    by_env = run("get", "keys", FLEETGATE_API=rig.base_url, FLEETGATE_TOKEN=token)
    assert by_env.returncode == 0
    wrong = run("get", "keys", "--token", "wrong", FLEETGATE_API=rig.base_url, FLEETGATE_TOKEN=token)
    assert wrong.returncode == 1
    assert "owner token" in wrong.stderr
    elsewhere = {"FLEETGATE_API": "http://127.0.0.1:1", "FLEETGATE_TOKEN": "of-another-place"}
    assert run("get", "keys", "--data-dir", str(rig.data_dir), **elsewhere).returncode == 0
    absent = run("get", "gateway", "none", FLEETGATE_API=rig.base_url, FLEETGATE_TOKEN=token)
    assert absent.returncode == 1
    assert absent.stderr.startswith("there is no Gateway 'none'")


def test_this_machines_token_is_sent_to_this_machine_only(rig: ControlRig, tmp_path: Path) -> None:
    (tmp_path / ".fleetgate").mkdir()
    (tmp_path / ".fleetgate" / "owner-token").write_text((rig.data_dir / "owner-token").read_text())
    assert run("get", "keys", "--api", rig.base_url, HOME=str(tmp_path)).returncode == 0
    abroad = run("get", "keys", "--api", "http://192.0.2.1:7801", HOME=str(tmp_path))
    assert abroad.returncode == 1
    assert "there is no owner token" in abroad.stderr


def test_help_teaches() -> None:
    for words in (("--help",), ("apply", "--help"), ("keys", "create", "--help"), ("get", "-h")):
        done = run(*words)
        assert done.returncode == 0
        assert "fleetgate" in done.stdout
    assert "Examples" in run("keys", "create", "--help").stdout
