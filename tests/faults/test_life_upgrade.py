"""Rolling upgrades under load: nothing fails, nothing is cut, and the books stay right."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2

from tests.faults.life_load import Load
from tests.loopback.engines import engine
from tests.loopback.up_rig import Up, deployment, gateway, is_alive, kill
from tests.waiting import wait_for

UPGRADES = int(os.environ.get("FLEETGATE_UPGRADES", "3"))
STREAMS = 100 if UPGRADES >= 10 else 50
WORKER = "fleetgate.proxy.worker"


@contextmanager
def running(folder: Path, *flags: str, **fields: object) -> Iterator[Up]:
    """Two workers in front of two simulated engines whose streams last some 1.5 s."""
    with ExitStack() as stack:
        speed = ("--prefill-tokens-per-s", "0", "--decode-base-s", "0.05", "--decode-per-sequence-s", "0")
        urls = [stack.enter_context(engine("--model", "m", *speed)) for _ in range(2)]
        documents = [deployment(name, url, **fields) for name, url in zip("ab", urls, strict=True)]
        spread = gateway("chat", "a", "b", strategy="capacity_round_robin", default=True)
        yield stack.enter_context(Up(folder, [*documents, spread], "--auth", "none", "--access-log", "off", *flags))


def columns(up: Up) -> list[dict[str, int]]:
    """The workers as the API shows them."""
    token = (up.data_dir / "owner-token").read_text().strip()
    shown = httpx2.get(f"{up.api}/api/v1/state", headers={"authorization": f"Bearer {token}"}, trust_env=False)
    return list(shown.json()["workers"])


def upgrade(up: Up) -> None:
    """One upgrade from the signal to the end of the last old worker."""
    before = set(up.children(WORKER))
    up.process.send_signal(signal.SIGHUP)
    wait_for(lambda: not before & set(up.children(WORKER)), 90)
    assert len(up.children(WORKER)) == len(before)


def test_row_73_upgrades_under_load_fail_and_cut_nothing(tmp_path: Path) -> None:
    with running(tmp_path) as up:
        with Load(up.port, short=30, streams=STREAMS) as load:
            wait_for(lambda: load.outcomes["stream"] > 20)
            for number in range(UPGRADES):
                good = load.good
                upgrade(up)
                wait_for(lambda good=good: load.good > good + 50)  # type: ignore[misc]
                assert not load.bad, f"in upgrade {number}: {load.bad}"
            load.stop()
        assert not load.bad
        assert load.rate > 50, load.rate
        wait_for(up.is_ready)
        assert [row["accepting"] for row in columns(up)] == [True, True]
        print(f"{UPGRADES} upgrades: {load.outcomes}, {load.rate:.0f} answers/s, {load.opened} connections")


def test_an_upgrade_that_does_not_come_up_leaves_the_old_workers_serving(tmp_path: Path) -> None:
    with running(tmp_path) as up, Load(up.port, short=4, streams=4) as load:
        before = set(up.children(WORKER))
        up.process.send_signal(signal.SIGHUP)
        wait_for(lambda: len(up.children(WORKER)) > len(before))
        for pid in set(up.children(WORKER)) - before:
            kill(pid)
        wait_for(lambda: b"the upgrade was cancelled" in up.log.read_bytes())
        assert before <= set(up.children(WORKER))
        upgrade(up)
        load.stop()
        assert not load.bad, load.bad


def test_a_limit_holds_while_two_generations_share_it(tmp_path: Path) -> None:
    """Old streams hold places of a Deployment with 4; the new workers may not hand out more than what is left."""
    with running(tmp_path, capacity={"concurrency": 4}) as up, Load(up.port, short=0, streams=20) as load:
        load.stream_tokens = 60
        most = 0
        wait_for(lambda: load.outcomes["stream"] > 4)
        before = set(up.children(WORKER))
        up.process.send_signal(signal.SIGHUP)
        deadline_s = time.monotonic() + 60
        while before & set(up.children(WORKER)) and time.monotonic() < deadline_s:
            text = httpx2.get(f"{up.api}/metrics", trust_env=False).text
            held = [line for line in text.splitlines() if line.startswith("fleetgate_in_flight{")]
            most = max(most, *(int(float(line.rpartition(" ")[2])) for line in held))
            time.sleep(0.02)
        assert most == 4  # all of it, and never more
        load.stop()
        assert not load.bad, load.bad

        def in_flight() -> list[str]:
            try:
                text = httpx2.get(f"{up.api}/metrics", trust_env=False).text
            except httpx2.TransportError:  # the control process is the last to be replaced
                return []
            return [line for line in text.splitlines() if line.startswith("fleetgate_in_flight{")]

        # Not at once: the new prober asks each engine once how it goes on with an answer, and has a place for that.
        wait_for(lambda: bool(in_flight()) and all(line.endswith(" 0.0") for line in in_flight()))


def test_row_71_a_killed_worker_breaks_its_own_streams_only(tmp_path: Path) -> None:
    with running(tmp_path) as up, Load(up.port, short=4, streams=30) as load:
        wait_for(lambda: load.outcomes["stream"] > 10)
        victim = max(columns(up), key=lambda row: row["connections"])
        others = sum(row["connections"] for row in columns(up)) - victim["connections"]
        kill(victim["pid"])
        wait_for(lambda: all(row["accepting"] for row in columns(up)) and not is_alive(victim["pid"]))
        good = load.good
        wait_for(lambda: load.good > good + 50)
        load.stop()
        assert sum(load.bad.values()) <= victim["connections"] + 4, load.bad  # the 4: who had just connected
        assert others > 0


def test_the_command_reloads_workers_and_control_process(tmp_path: Path) -> None:
    with running(tmp_path) as up, Load(up.port, short=4, streams=4) as load:
        workers, control = set(up.children(WORKER)), set(up.children("fleetgate.control.process"))
        told = up.cli("reload")
        assert told.returncode == 0, told.stderr
        assert "2 new workers serve" in told.stdout
        wait_for(lambda: not workers & set(up.children(WORKER)), 60)
        wait_for(lambda: not control & set(up.children("fleetgate.control.process")))
        wait_for(up.is_ready)
        wait_for(lambda: "upgrade is complete" in up.cli("get", "events").stdout)
        assert "was restarted" not in up.cli("get", "events").stdout
        load.stop()
        assert not load.bad, load.bad
