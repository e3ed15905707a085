"""The whole product as an operator runs it: one command, one file, real processes, real sockets."""

import concurrent.futures
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from tests.loopback.engines import engine, metric
from tests.loopback.up_rig import Up, deployment, gateway, is_alive, kill, run
from tests.waiting import wait_for

QUICK = ("--model", "m", "--prefill-tokens-per-s", "0", "--decode-base-s", "0")


@pytest.fixture(scope="module")
def quick() -> Iterator[str]:
    """An engine that answers at once."""
    with engine(*QUICK) as url:
        yield url


class Traffic:
    """Requests without pause from a few threads until stopped; keeps every answer that was not a 200."""

    def __init__(self, up: Up, key: str) -> None:
        self._up, self._key = up, key
        self._stop = threading.Event()
        self.count = 0
        self.bad: list[str] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(4)]

    def _run(self) -> None:
        with httpx2.Client(trust_env=False, timeout=30) as client:
            while not self._stop.is_set():
                body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
                headers = {"authorization": f"Bearer {self._key}"}
                try:
                    answer = client.post(f"{self._up.url}/chat/completions", json=body, headers=headers)
                    if answer.status_code != 200:
                        self.bad.append(answer.text)
                except httpx2.HTTPError as error:
                    self.bad.append(repr(error))
                self.count += 1

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        wait_for(lambda: self.count > 50)
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)


def test_config_changes_reach_all_workers_under_load_without_dropping_a_request(tmp_path: Path, quick: str) -> None:
    documents = [deployment("a", quick), gateway("chat", "a")]
    with Up(tmp_path, documents) as up:
        key = up.new_key("load")
        with Traffic(up, key) as traffic:
            for round_number in range(4):
                extra = f"more-{round_number}"
                models = [{"name": "m"}, {"name": extra, "upstream_name": "m"}]
                up.write([deployment("a", quick, models=models), gateway("chat", "a")])
                applied = up.cli("apply", "-f", str(up.config))
                assert applied.returncode == 0 and "Deployment/a changed" in applied.stdout, applied.stderr
                assert {up.ask(key, extra).status_code for _ in range(8)} == {200}, "apply returns when workers have it"
        assert traffic.count > 100 and not traffic.bad


def test_a_revoked_key_is_refused_by_every_worker_when_the_command_returns(tmp_path: Path, quick: str) -> None:
    with Up(tmp_path, [deployment("a", quick), gateway("chat", "a")]) as up:
        key, other = up.new_key("one"), up.new_key("two")
        assert all(up.ask(key).status_code == 200 for _ in range(8))
        assert up.cli("delete", "key", "one").returncode == 0
        assert {up.ask(key).status_code for _ in range(16)} == {401}
        assert up.ask(other).status_code == 200


def test_two_gateways_on_one_listener_serve_their_own_models(tmp_path: Path, quick: str) -> None:
    documents = [
        deployment("a", quick),
        deployment("b", quick, models=[{"name": "other", "upstream_name": "m"}]),
        gateway("chat", "a", default=True),
        gateway("lab", "b"),
    ]
    with Up(tmp_path, documents) as up:
        key = up.new_key("any")
        lab_only = up.new_key("scoped", "--gateway", "lab")

        def models(host: str, token: str) -> tuple[int, list[str]]:
            headers = {"host": host, "authorization": f"Bearer {token}"}
            answer = httpx2.get(f"{up.url}/models", headers=headers, trust_env=False)
            return answer.status_code, [model["id"] for model in answer.json().get("data", [])]

        assert models("chat.test", key) == (200, ["m"])
        assert models(f"LAB.test:{up.port}", key) == (200, ["other"])
        assert models(f"127.0.0.1:{up.port}", key) == (200, ["m"])
        assert models("nobody.test", key) == (404, [])
        assert models("lab.test", lab_only) == (200, ["other"])
        assert models("chat.test", lab_only) == (403, [])


def test_traffic_goes_on_without_the_control_process_and_a_worker_comes_back(tmp_path: Path, quick: str) -> None:
    with Up(tmp_path, [deployment("a", quick), gateway("chat", "a")]) as up:
        key = up.new_key("load")
        with Traffic(up, key) as traffic:
            (control,) = up.children("fleetgate.control.process")
            kill(control)
            seen = traffic.count
            wait_for(lambda: traffic.count > seen + 200)
            wait_for(lambda: up.children("fleetgate.control.process") not in ([], [control]))
            wait_for(up.is_ready)
        assert not traffic.bad
        worker = up.children("fleetgate.proxy.worker")[0]
        kill(worker)
        wait_for(lambda: worker not in up.children("fleetgate.proxy.worker"))
        wait_for(lambda: len(up.children("fleetgate.proxy.worker")) == 2 and up.is_ready())
        assert all(up.ask(key).status_code == 200 for _ in range(8))


def test_nothing_outlives_a_supervisor_that_was_killed(tmp_path: Path, quick: str) -> None:
    with Up(tmp_path, [deployment("a", quick), gateway("chat", "a")]) as up:
        children = [*up.children("fleetgate.proxy.worker"), *up.children("fleetgate.control.process")]
        assert len(children) == 3
        kill(up.process.pid)
        up.process.wait()
        wait_for(lambda: not any(is_alive(pid) for pid in children))


def test_a_running_answer_ends_before_a_stopped_gateway_does(tmp_path: Path) -> None:
    documents = [deployment("a", ""), gateway("chat", "a")]
    with engine("--model", "m", "--decode-tokens-per-s", "20") as url, concurrent.futures.ThreadPoolExecutor() as pool:
        documents[0]["url"] = url
        with Up(tmp_path, documents, "--auth", "none") as up:
            answer = pool.submit(up.ask, max_tokens=40)
            wait_for(lambda: metric(url, "vllm:num_requests_running") == 1)
            up.process.terminate()
            assert answer.result().status_code == 200
            assert up.process.wait(45) == 0


def test_the_first_region_dies_and_no_request_fails(tmp_path: Path, quick: str) -> None:
    argv = [sys.executable, "-m", "fleetgate.engine", "--listen", "127.0.0.1:0", *QUICK]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        url = first.stdout.readline().split()[-1]
        with Up(tmp_path, [deployment("one", url), deployment("two", quick), gateway("chat", "one", "two")]) as up:
            key = up.new_key("load")
            assert up.ask(key).headers["x-fleetgate-deployment"] == "one"
            with Traffic(up, key) as traffic:
                first.kill()
                seen = traffic.count
                wait_for(lambda: traffic.count > seen + 300)
            assert not traffic.bad
            assert up.ask(key).headers["x-fleetgate-deployment"] == "two"


def test_the_official_sdk_works_as_it_is(tmp_path: Path, quick: str) -> None:
    with Up(tmp_path, [deployment("a", quick), gateway("chat", "a")]) as up:
        client = openai.OpenAI(base_url=up.url, api_key=up.new_key("sdk"), max_retries=0)
        stream = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "Hello"}], max_tokens=5, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert len([piece for piece in pieces if piece]) == 5
        assert [model.id for model in client.models.list()] == ["m"]
        assert client.embeddings.create(model="m", input="x").data[0].embedding
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="none", messages=[{"role": "user", "content": "x"}])
        assert missing.value.code == "model_not_found" and missing.value.param == "model"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=up.url, api_key="fg_wrong", max_retries=0).models.list()


def test_a_secret_reaches_its_own_deployment_and_is_never_shown(tmp_path: Path, quick: str) -> None:
    with engine(*QUICK, "--api-key", "engine-canary") as url:
        secret = {"kind": "Secret", "name": "token", "value": "engine-canary"}
        locked = deployment("a", url, credential={"secret": "token"}, health={"path": "/health"})
        with Up(tmp_path, [secret, locked, gateway("chat", "a")]) as up:
            key = up.new_key("one")
            assert up.ask(key).status_code == 200
            up.write([{**secret, "value": "wrong-canary"}, locked, gateway("chat", "a")])
            assert up.cli("apply", "-f", str(up.config)).returncode == 0
            refused = up.ask(key)
            assert (refused.status_code, refused.json()["error"]["code"]) == (502, "upstream_auth_error")
            shown = up.cli("get", "secrets", "-o", "json").stdout + up.cli("describe", "secret", "token").stdout
            kept = b"".join(path.read_bytes() for path in up.data_dir.rglob("*") if path.is_file())
            assert "canary" not in shown and b"canary" not in kept and "canary" not in up.log.read_text()


def test_mistakes_at_the_start_are_one_clear_sentence_each(tmp_path: Path, quick: str) -> None:
    bad = [
        deployment("a", quick, engin="vllm"),
        deployment("b", "ftp://x/v1"),
        deployment("b", quick, capacity={"concurrency": -1}),
        gateway("chat", "nobody", strategy="overflw"),
    ]
    up = Up(tmp_path, bad)
    started = run("up", "--config", str(up.config), "--data-dir", str(up.data_dir), "--listen", "127.0.0.1:0")
    assert started.returncode == 1 and "Traceback" not in started.stderr
    for part in ("engin", "url", "concurrency", "nobody", "overflw"):
        assert part in started.stderr
    assert len(started.stderr.strip().splitlines()) >= 5
    good = ("--config", str(tmp_path / "good.yaml"), "--data-dir", str(up.data_dir))
    (tmp_path / "good.yaml").write_text("kind: Cluster\nname: here\nprovider: local\nregion: home\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        cases = {
            ("--listen", address): "--listen",
            ("--api-listen", address): "--api-listen",
            ("--listen", "0.0.0.0:0", "--auth", "none"): "--auth none",
            ("--tls", "dev"): "--tls-listen",
            ("--workers", "99"): "--workers",
            ("--egress-allow", "ten"): "--egress-allow",
            ("--listen", "nowhere"): "--listen",
            ("--grace-s", "inf"): "--grace-s",
            ("--transport", "smoke"): "--transport",
            ("--data-dir", "/proc/nothing"): "/proc/nothing",
        }
        for flags, named in cases.items():
            refused = run("up", *good, "--listen", "127.0.0.1:0", "--api-listen", "127.0.0.1:0", *flags)
            assert refused.returncode == 1, flags
            assert named in refused.stderr and len(refused.stderr.strip().splitlines()) == 1, refused.stderr
