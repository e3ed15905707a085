"""The control process from start to end: `--config`, bad data directories, kill -9, orderly ends."""

import json
import threading
from pathlib import Path

import httpx2
import pytest
import yaml

from fleetgate.control.resources.config_file import check_file
from fleetgate.ipc.shared_memory import EndpointSignal, WorkerCell
from tests.loopback.control_rig import DEPLOYMENT, GATEWAY, ControlRig
from tests.waiting import wait_for


def fleet_file(folder: Path, *documents: object) -> str:
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump_all(documents))
    return str(path)


def failed_start(rig: ControlRig) -> str:
    """What the process says when it cannot start; it must say it without a trace."""
    process = rig.spawn()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"Traceback" not in told
    return told.decode()


def test_a_config_file_is_applied_before_the_first_answer_and_trusted(tmp_path: Path) -> None:
    away = {**DEPLOYMENT, "url": "http://10.255.255.1:8000/v1"}
    with ControlRig(tmp_path / "data", config_file=fleet_file(tmp_path, away, GATEWAY)) as rig:
        assert not rig.snapshot().deployments[0].egress_checked
        version = rig.snapshot().version
        with rig.client() as api:
            # The operator's own URL stays allowed when other fields are changed, and a new URL is looked at.
            changed = {**away, "region": "eu-west"}
            assert api.put("/api/v1/deployments/llama-us", json=changed).status_code == 200
            assert not rig.snapshot().deployments[0].egress_checked
            moved = {**away, "url": "http://10.255.255.2:8000/v1"}
            assert api.put("/api/v1/deployments/llama-us", json=moved).status_code == 422
        assert rig.snapshot().version == version + 1
        assert (rig.data_dir / "api-address").read_text() == f"{rig.base_url}\n"
        assert rig.stop() == 0


def test_a_config_with_mistakes_stops_the_start_and_lists_them_all(tmp_path: Path) -> None:
    path = fleet_file(
        tmp_path,
        {**DEPLOYMENT, "enginne": "vllm", "url": "http://169.254.169.254/v1"},
        {
            **GATEWAY,
            "strategy": "nearest",
            "upstreams": [{"deployment": "other"}, {"deployment": "llama-us", "rank": 0}],
        },
    )
    lines = failed_start(ControlRig(tmp_path / "data", config_file=path)).strip().splitlines()
    assert lines == check_file(path, tmp_path / "data")
    assert [line.split(": ")[:3] for line in lines] == [
        [path, "Deployment/llama-us", "enginne"],
        [path, "Deployment/llama-us", "url"],
        [path, "Gateway/chat", "strategy"],
        [path, "Gateway/chat", "upstreams[1].rank"],
        [path, "Gateway/chat", "upstreams[0].deployment"],
    ]


def test_what_is_removed_from_the_file_stays(tmp_path: Path) -> None:
    path = fleet_file(tmp_path, DEPLOYMENT, GATEWAY)
    with ControlRig(tmp_path / "data", config_file=path) as rig:
        assert rig.stop() == 0
        fleet_file(tmp_path, DEPLOYMENT)
        rig.start()
        assert [gateway.name for gateway in rig.snapshot().gateways] == ["chat"]


def test_a_restart_publishes_nothing_when_nothing_changed(tmp_path: Path) -> None:
    secret = {"kind": "Secret", "name": "token", "value": "s3cret"}
    path = fleet_file(tmp_path, {**DEPLOYMENT, "credential": {"secret": "token"}}, GATEWAY, secret)
    with ControlRig(tmp_path / "data", config_file=path) as rig:
        before = (rig.data_dir / "snapshot").read_bytes()
        rig.kill()
        rig.start()
        assert (rig.data_dir / "snapshot").read_bytes() == before


def test_versions_rise_even_when_the_snapshot_is_lost_or_damaged(tmp_path: Path) -> None:
    with ControlRig(tmp_path / "data") as rig:
        version = rig.snapshot().version
        for damage in (b"", b"{", b'{"version": "x"}'):
            rig.kill()
            (rig.data_dir / "snapshot").write_bytes(damage)
            rig.start()
            assert rig.snapshot().version > version
            version = rig.snapshot().version


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("fleetgate.db", b"this is not a database, and long enough to be read as one" * 20, "fleetgate.db"),
        ("seal.key", b"short", "seal.key"),
        ("pepper", b"", "pepper"),
        ("owner-token", b"x", "owner-token"),
    ],
)
def test_a_damaged_data_directory_is_one_clear_sentence(tmp_path: Path, file: str, content: bytes, named: str) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    (data_dir / file).write_bytes(content)
    told = failed_start(ControlRig(data_dir))
    assert named in told
    assert len(told.strip().splitlines()) == 1


def test_a_data_directory_that_cannot_be_made_is_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    told = failed_start(ControlRig(tmp_path / "file" / "data"))
    assert "--data-dir" in told
    assert len(told.strip().splitlines()) == 1


def test_two_processes_never_share_a_data_directory(tmp_path: Path) -> None:
    with ControlRig(tmp_path / "data"):
        assert "in use" in failed_start(ControlRig(tmp_path / "data"))


def test_it_ends_when_the_supervisor_does(tmp_path: Path) -> None:
    with ControlRig(tmp_path / "data") as rig:
        rig.end_life()
        assert rig.process is not None
        assert rig.process.wait(timeout=30) == 0


def test_acknowledged_writes_survive_kill_9_and_half_written_sets_do_not_exist(tmp_path: Path) -> None:
    """Sets of two documents are written while the process is killed, again and again."""
    acknowledged: list[int] = []
    pair = ({"kind": "Cluster", "provider": "local"}, {"kind": "Secret", "value": "s"})

    def write_until_killed(rig: ControlRig, first: int) -> None:
        with rig.client() as api:
            for index in range(first, first + 10_000):
                documents = [
                    {**pair[0], "name": f"c-{index}", "region": f"r-{index}"},
                    {**pair[1], "name": f"s-{index}"},
                ]
                try:
                    answer = api.post("/api/v1/apply", json={"documents": documents})
                except httpx2.TransportError:
                    return
                assert answer.status_code == 200
                acknowledged.append(index)

    with ControlRig(tmp_path / "data") as rig:
        version = 0
        for round_ in range(3):
            before = len(acknowledged)
            writer = threading.Thread(target=write_until_killed, args=(rig, round_ * 10_000))
            writer.start()
            wait_for(lambda before=before: len(acknowledged) >= before + 5)  # type: ignore[misc]
            rig.kill()
            writer.join()
            rig.start()
            with rig.client() as api:
                clusters = {item["name"][2:] for item in api.get("/api/v1/clusters").json()["items"]}
                secrets = {item["name"][2:] for item in api.get("/api/v1/secrets").json()["items"]}
            assert clusters == secrets, "a set was half written"
            assert {str(index) for index in acknowledged} <= clusters
            assert rig.snapshot().version >= version
            version = rig.snapshot().version


def test_ready_means_accepting_with_the_config_and_one_probe_or_two_seconds(tmp_path: Path) -> None:
    with ControlRig(tmp_path / "data", workers=2, config_file=fleet_file(tmp_path, DEPLOYMENT, GATEWAY)) as rig:

        def ask() -> tuple[int, str]:
            with httpx2.Client(base_url=rig.base_url, trust_env=False) as client:
                answer = client.get("/readyz")
                return answer.status_code, json.dumps(answer.json()["reasons"])

        rig.act_as_worker(0, rig.snapshot().version)
        rig.board.set_signal(rig.snapshot().deployments[0].endpoints[0].slot, EndpointSignal.SEEN_MS, 1)
        status, reasons = ask()
        assert status == 503
        assert "1 of 2 workers accept connections" in reasons
        rig.act_as_worker(1, rig.snapshot().version - 1)
        assert ask()[0] == 503
        rig.act_as_worker(1, rig.snapshot().version)
        assert ask() == (200, "[]")
        rig.board.set(0, WorkerCell.ACCEPTING, 0)
        assert ask()[0] == 503


def test_worker_restarts_become_events(tmp_path: Path) -> None:
    with ControlRig(tmp_path / "data") as rig, rig.client() as api:
        rig.act_as_worker(0, rig.snapshot().version)
        rig.board.set(0, WorkerCell.STARTS, 2)
        wait_for(lambda: any(item["object"]["kind"] == "Worker" for item in api.get("/api/v1/events").json()["items"]))
        assert "fleetgate_worker_restarts_total 1.0" in api.get("/metrics").text
