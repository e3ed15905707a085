"""Static stability: what happens to the control plane does not happen to traffic. FAULTS.md rows 47, 48, 51, 52."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx2
import pytest

from fleetgate.ipc.signed_file import LAST_GOOD, SNAPSHOT
from tests.loopback.engines import engine
from tests.loopback.up_rig import Up, deployment, free_port, gateway, is_alive, kill
from tests.waiting import wait_for

QUICK = ("--model", "m", "--prefill-tokens-per-s", "0", "--decode-base-s", "0")
CONTROL, WORKER = "fleetgate.control.process", "fleetgate.proxy.worker"
OUTAGE_S = 6.0  # longer than the silence that counts as an outage


@pytest.fixture(scope="module")
def quick() -> Iterator[str]:
    """An engine that answers at once."""
    with engine(*QUICK) as url:
        yield url


class OpsUp(Up):
    """With an operations listener, whose word on readiness counts: the API may be away from the start on."""

    def __init__(self, folder: Path, documents: list[dict[str, Any]], *flags: str) -> None:
        self.ops_port = free_port()
        super().__init__(folder, documents, "--ops-listen", f"127.0.0.1:{self.ops_port}", *flags)
        self.waits_for_api = True

    def ops(self, path: str) -> httpx2.Response:
        return httpx2.get(f"http://127.0.0.1:{self.ops_port}{path}", timeout=10, trust_env=False)

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx2.HTTPError):
            if self.ops("/readyz").status_code == 200:
                return super().is_ready() if self.waits_for_api else True
        return False

    def degraded(self) -> str:
        answer = self.ops("/readyz")
        assert answer.status_code == 200, answer.text
        return "; ".join(answer.json()["degraded"])

    def events(self) -> str:
        return self.cli("get", "events", "-o", "json").stdout


class Load:
    """Requests without pause over several connections; keeps what was not a 200 with the moment it came."""

    def __init__(self, up: Up, key: str, clients: int = 8) -> None:
        self._up, self._key = up, key
        self._stop = threading.Event()
        self.count = 0
        self.bad: list[tuple[float, str]] = []
        self._threads = [threading.Thread(target=self._run, args=(n % 2 == 0,)) for n in range(clients)]

    def _run(self, stream: bool) -> None:
        body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "stream": stream}
        headers = {"authorization": f"Bearer {self._key}"}
        with httpx2.Client(trust_env=False, timeout=30) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post(f"{self._up.url}/chat/completions", json=body, headers=headers)
                    whole = answer.status_code == 200 and (not stream or b'"finish_reason":"' in answer.content)
                    if not whole:
                        self.bad.append((time.monotonic(), answer.text))
                except httpx2.HTTPError as error:
                    self.bad.append((time.monotonic(), repr(error)))
                self.count += 1
                time.sleep(0.01)

    def wait_for_more(self, count: int) -> None:
        """Until so many more have ended."""
        seen = self.count
        wait_for(lambda: self.count > seen + count, 60)

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        wait_for(lambda: self.count > 50)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)


def test_row_47_a_control_process_that_hangs_or_dies_costs_no_request(tmp_path: Path, quick: str) -> None:
    with OpsUp(tmp_path, [deployment("a", quick), gateway("chat", "a")]) as up:
        key = up.new_key("load")
        with Load(up, key) as load:
            assert up.degraded() == ""
            (control,) = up.children(CONTROL)
            os.kill(control, signal.SIGSTOP)
            try:
                began = load.count
                time.sleep(OUTAGE_S)
                assert load.count > began + 100
                assert "no heartbeat of the control plane" in up.degraded() and "workers serve from" in up.degraded()
                page = up.ops("/metrics").text
                silent_s = next(line for line in page.splitlines() if line.startswith("fleetgate_control_silent"))
                assert float(silent_s.split()[1]) > OUTAGE_S - 2
            finally:
                os.kill(control, signal.SIGCONT)
            wait_for(lambda: up.degraded() == "")
            for _ in range(3):
                (control,) = up.children(CONTROL)
                kill(control)
                load.wait_for_more(100)
                wait_for(lambda old=control: up.children(CONTROL) not in ([], [old]))  # type: ignore[misc]
            wait_for(up.is_ready)
            up.cli("keys", "create", "after")  # and what comes back works
            load.wait_for_more(50)
        assert not load.bad, load.bad[:3]


def test_row_48_workers_and_the_machine_start_without_store_and_control_plane(tmp_path: Path, quick: str) -> None:
    """Store, Snapshot file and control process are all away; keys are still asked for."""
    with OpsUp(tmp_path, [deployment("a", quick), gateway("chat", "a")]) as up:
        key = up.new_key("one")
        wait_for(lambda: (up.data_dir / LAST_GOOD).exists())
        wait_for(lambda: (up.data_dir / LAST_GOOD).read_bytes() == (up.data_dir / SNAPSHOT).read_bytes())
        (control,) = up.children(CONTROL)
        os.kill(control, signal.SIGSTOP)
        (up.data_dir / SNAPSHOT).write_bytes(b"damage")
        for _ in range(2):
            workers = up.children(WORKER)
            for worker in workers:
                kill(worker)
            wait_for(lambda old=workers: not any(map(is_alive, old)))  # type: ignore[misc]
            wait_for(up_again(up))
            assert {up.ask(key).status_code for _ in range(8)} == {200}
        os.kill(control, signal.SIGCONT)
    for file in up.data_dir.glob("fleetgate.db*"):
        file.write_bytes(b"this was a database " * 100)
    up.waits_for_api = False
    for _ in range(2):
        with up:
            assert {up.ask(key).status_code for _ in range(8)} == {200}
            assert up.ask("").status_code == 401
            assert "no heartbeat of the control plane since the start" in up.degraded()
            assert "is refused: it is not signed" in up.log.read_text()


def up_again(up: OpsUp) -> Any:
    """Whether two workers accept."""

    def look() -> bool:
        try:
            return len(up.children(WORKER)) == 2 and "not running" not in up.degraded()
        except (httpx2.HTTPError, AssertionError):
            return False

    return look


def test_row_48_a_machine_that_was_never_configured_does_not_start_on_a_damaged_store(tmp_path: Path) -> None:
    up = OpsUp(tmp_path, [gateway("chat", "a")])
    up.data_dir.mkdir()
    (up.data_dir / "fleetgate.db").write_bytes(b"this was a database " * 100)
    with pytest.raises(AssertionError, match="fleetgate\\.db"), up:
        pass


def test_row_51_an_empty_store_in_place_of_ours_takes_nothing_away(tmp_path: Path, quick: str) -> None:
    up = OpsUp(tmp_path, [deployment("a", quick), gateway("chat", "a")])
    with up:
        key = up.new_key("one")
        wait_for(lambda: (up.data_dir / LAST_GOOD).exists())
    for file in up.data_dir.glob("fleetgate.db*"):
        file.unlink()
    up.write([])
    with up:
        assert {up.ask(key).status_code for _ in range(8)} == {200}
        assert "the store has no Gateway" in httpx2.get(f"{up.api}/readyz", trust_env=False).text
        up.write(
            [deployment("a", quick, models=[{"name": "m"}, {"name": "m2", "upstream_name": "m"}]), gateway("chat", "a")]
        )
        assert up.cli("apply", "-f", str(up.config)).returncode == 0
        assert up.ask(up.new_key("two"), "m2").status_code == 200, (
            "a fleet that is applied anew is above the old version"
        )


def test_row_52_a_bad_change_stays_in_one_worker_and_is_taken_back(tmp_path: Path, quick: str) -> None:
    with OpsUp(tmp_path, [deployment("a", quick), gateway("chat", "a")]) as up:
        key = up.new_key("load")
        with Load(up, key, clients=12) as load:
            load.wait_for_more(1500)
            up.write([deployment("a", f"http://127.0.0.1:{free_port()}/v1"), gateway("chat", "a")])
            assert up.cli("apply", "-f", str(up.config)).returncode == 0
            wait_for(lambda: "was rolled back" in up.events())
            assert "more requests failed" in up.degraded() or "in use again" in up.events()
            ended_s = time.monotonic() + 0.5
            wait_for(lambda: time.monotonic() > ended_s + 2.0)
            late = [what for at_s, what in load.bad if at_s > ended_s]
            assert load.bad and not late, late[:3]
            # A key is taken back at once, whatever became of the routing.
            other = up.new_key("other")
            assert up.ask(other).status_code == 200
            assert up.cli("delete", "key", "other").returncode == 0
            wait_for(lambda: {up.ask(other).status_code for _ in range(8)} == {401}, 5)
            # And the next change mends it.
            up.write([deployment("a", quick), gateway("chat", "a")])
            assert up.cli("apply", "-f", str(up.config)).returncode == 0
            wait_for(lambda: up.degraded() == "")
            mended_s = time.monotonic()
            load.wait_for_more(200)
        assert not [what for at_s, what in load.bad if at_s > mended_s]


def test_row_52_what_takes_much_away_is_asked_about(tmp_path: Path, quick: str) -> None:
    port = httpx2.URL(quick).port
    many = [f"http://127.0.0.{number}:{port}/v1" for number in range(1, 16)]
    documents = [deployment("a", quick), deployment("b", ""), gateway("chat", "a", "b")]
    del documents[1]["url"]
    documents[1]["urls"] = many
    with Up(tmp_path, documents) as up:
        documents[1]["urls"] = many[:3]
        up.write(documents)
        asked = up.cli("apply", "-f", str(up.config))
        assert asked.returncode == 1
        assert "removes 12 of 16 Endpoints (75 %)" in asked.stderr and "--yes" in asked.stderr
        refused = up.cli("delete", "gateway", "chat")
        assert refused.returncode == 1 and "16 of 16" in refused.stderr
        token = (up.data_dir / "owner-token").read_text().strip()
        answer = httpx2.put(
            f"{up.api}/api/v1/deployments/b",
            json=documents[1],
            headers={"authorization": f"Bearer {token}"},
            trust_env=False,
        )
        assert (answer.status_code, answer.json()["error"]["needs_confirmation"]) == (409, True)
        assert many[14] in up.cli("get", "deployment", "b", "-o", "json").stdout, "nothing was changed"
        assert up.cli("apply", "-f", str(up.config), "--yes").returncode == 0
        assert up.cli("delete", "gateway", "chat").returncode == 0, "four Endpoints are not many"
