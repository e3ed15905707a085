"""Keys that are revoked, with and without the control plane. FAULTS.md rows 64 and 65."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.loopback.engines import engine, metric
from tests.loopback.up_rig import Up, deployment, gateway, kill
from tests.waiting import wait_for

CONTROL, WORKER = "fleetgate.control.process", "fleetgate.proxy.worker"
SLOW = ("--model", "m", "--prefill-tokens-per-s", "0", "--decode-base-s", "0.1")


@pytest.fixture(scope="module")
def slow() -> Iterator[str]:
    """An engine that gives ten tokens a second."""
    with engine(*SLOW) as url:
        yield url


@contextlib.contextmanager
def control_stopped(up: Up) -> Iterator[None]:
    """A control plane that hangs."""
    (control,) = up.children(CONTROL)
    os.kill(control, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(control, signal.SIGCONT)


def statuses(up: Up, key: str, count: int = 6) -> set[int]:
    """What several new connections get, so that each worker is asked."""
    return {up.ask(key, max_tokens=1).status_code for _ in range(count)}


class Stream:
    """A long answer that somebody reads."""

    def __init__(self, up: Up, key: str, tokens: int) -> None:
        self.lines: list[str] = []
        self.error = ""
        self._up, self._key, self._tokens = up, key, tokens
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        wait_for(lambda: len(self.lines) > 2)

    def _run(self) -> None:
        body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": self._tokens}
        headers = {"authorization": f"Bearer {self._key}"}
        with httpx2.Client(trust_env=False, timeout=60) as client:
            try:
                url = f"{self._up.url}/chat/completions"
                with client.stream("POST", url, json={**body, "stream": True}, headers=headers) as answer:
                    self.lines.extend(line for line in answer.iter_lines() if line)
            except httpx2.HTTPError as error:
                self.error = repr(error)

    def end(self) -> None:
        """Wait for its end."""
        self._thread.join(30)
        assert not self._thread.is_alive()


def test_row_64_a_revoked_key_takes_its_streams_along_where_it_says_so(tmp_path: Path, slow: str) -> None:
    with Up(tmp_path, [deployment("a", slow), gateway("chat", "a")]) as up:
        risky, calm = up.new_key("risky", "--kill-streams"), up.new_key("calm")
        cut = [Stream(up, risky, 3000) for _ in range(4)]  # over both workers
        kept = Stream(up, calm, 60)
        not_begun: list[httpx2.Response] = []
        asking = threading.Thread(target=lambda: not_begun.append(up.ask(risky, max_tokens=3000)))
        asking.start()
        wait_for(lambda: metric(slow, "vllm:num_requests_running") == 6)
        begun_s = time.monotonic()
        assert up.cli("delete", "key", "calm").returncode == 0
        assert up.cli("delete", "key", "risky").returncode == 0
        for stream in cut:
            stream.end()
            assert '"code":"invalid_api_key"' in stream.lines[-1] and stream.error, stream.lines[-1]
        assert time.monotonic() - begun_s < 5 + 5  # two commands start an interpreter each
        asking.join(30)
        assert [answer.status_code for answer in not_begun] == [401]
        assert not_begun[0].json()["error"]["code"] == "invalid_api_key"
        kept.end()
        assert kept.lines[-1] == "data: [DONE]" and not kept.error
        assert statuses(up, risky) == statuses(up, calm) == {401}
        wait_for(lambda: metric(slow, "vllm:num_requests_running") == 0)  # the GPU is free


def test_row_65_a_key_is_revoked_on_the_machine_while_the_control_plane_is_away(tmp_path: Path, slow: str) -> None:
    with Up(tmp_path, [deployment("a", slow), gateway("chat", "a")]) as up:
        leaked, fine, strict = up.new_key("leaked"), up.new_key("fine"), up.new_key("strict", "--require-fresh", "3s")
        listed = up.data_dir / "revoked"
        with control_stopped(up):
            assert statuses(up, leaked) == statuses(up, fine) == statuses(up, strict) == {200}
            told = up.cli("keys", "revoke", "leaked")
            assert told.returncode == 0 and "revoked on this machine" in told.stdout, told.stderr
            wait_for(lambda: statuses(up, leaked) == {401}, 5)
            wait_for(lambda: statuses(up, strict) == {503}, 10)  # it asked to fail closed
            assert statuses(up, fine) == {200}
            damaged = listed.read_bytes().replace(b'"leaked"', b'"nobody"')
            listed.write_bytes(damaged)  # this must not bring it back
            time.sleep(0.5)
            assert statuses(up, leaked) == {401}
            listed.unlink()
            wait_for(lambda: statuses(up, leaked) == {200})  # it was the list alone that refused it
            assert up.cli("keys", "revoke", "leaked").returncode == 0
            wait_for(lambda: statuses(up, leaked) == {401}, 5)
            kill(up.children(WORKER)[0])
            wait_for(lambda: len(up.children(WORKER)) == 2)
            assert 200 not in statuses(up, leaked)
            absent = up.cli("keys", "revoke", "leakd")
            assert absent.returncode == 1 and "fine, leaked, strict" in absent.stderr
        wait_for(lambda: not listed.exists())
        assert statuses(up, leaked) == {401}
        assert statuses(up, strict) == {200}
        names = [one["name"] for one in json.loads(up.cli("get", "keys", "-o", "json").stdout)]
        assert sorted(names) == ["fine", "strict"]
        assert "Key leaked was deleted because it was revoked on the machine by" in up.cli("get", "events").stdout


def test_row_65_keys_are_good_for_so_long_without_a_control_plane(tmp_path: Path, slow: str) -> None:
    with Up(tmp_path, [deployment("a", slow), gateway("chat", "a")], "--max-stale-s", "4") as up:
        key = up.new_key("k")
        with control_stopped(up):
            assert statuses(up, key) == {200}
            wait_for(lambda: statuses(up, key) == {401}, 10)
            assert "--max-stale-s" in up.ask(key).json()["error"]["message"]
        wait_for(lambda: statuses(up, key) == {200}, 10)
