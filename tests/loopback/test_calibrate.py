"""`fleetgate calibrate` against engines whose speeds are known, and against all that can come in between."""

import asyncio
import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from fleetgate.control.calibration.client import (
    CalibrationClient,
    CalibrationTarget,
    MeasuredResponse,
    RequestFailed,
    dialable_address,
)
from fleetgate.core.model import Endpoint
from tests.loopback.control_rig import DEPLOYMENT, ControlRig
from tests.loopback.engines import engine, metric
from tests.loopback.up_rig import COMMAND, run
from tests.waiting import wait_for

SMALL = {"requests_max": 60, "tokens_max": 40_000}
PATH = "/api/v1/deployments/{}/calibrations"


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlRig]:
    with ControlRig(tmp_path_factory.mktemp("control") / "data") as rig:
        yield rig


@pytest.fixture(scope="module")
def client(rig: ControlRig) -> Iterator[httpx2.Client]:
    with rig.client() as client:
        yield client


@pytest.fixture(scope="module")
def slow_engine() -> Iterator[str]:
    with engine("--model", "meta/llama", "--slots", "8", "--decode-base-s", "0.03") as url:
        yield url


def deploy(client: httpx2.Client, name: str, url: str, **fields: Any) -> None:
    answer = client.put(f"/api/v1/deployments/{name}", json={**DEPLOYMENT, "name": name, "url": url, **fields})
    assert answer.status_code in (200, 201), answer.text


def ended(client: httpx2.Client, name: str, **order: Any) -> dict[str, Any]:
    """A calibration from its begin to its end."""
    begun = client.post(PATH.format(name), json={**SMALL, **order})
    assert begun.status_code == 202, begun.text
    path = f"{PATH.format(name)}/{begun.json()['id']}"
    wait_for(lambda: client.get(path).json()["state"] != "running")
    return dict(client.get(path).json())


def has_no_profile(client: httpx2.Client, name: str) -> bool:
    return client.get(f"/api/v1/profiles/{name}").status_code == 404


def test_known_speeds_come_back_and_the_profile_is_put_to_use(rig: ControlRig, client: httpx2.Client) -> None:
    speeds = ("--prefill-tokens-per-s", "20000", "--decode-base-s", "0.008", "--decode-per-sequence-s", "0.001")
    with engine("--model", "meta/llama", "--slots", "8", *speeds) as url:
        deploy(client, "fast", url, accelerator={"sku": "L4", "count": 2})
        told = run("calibrate", "fast", "--use", "-o", "yaml", "--data-dir", str(rig.data_dir), timeout_s=120)
    assert told.returncode == 0, told.stderr
    assert "at most 527 requests" in told.stderr
    profile = yaml.safe_load(told.stdout)
    assert (profile["kind"], profile["name"], profile["model"]) == ("Profile", "fast-llama", "llama")
    assert (profile["sku"], profile["accelerators_per_replica"], profile["engine"]) == ("L4", 2, "vllm")
    assert profile["prefill_tokens_per_s"] == pytest.approx(20_000, rel=0.15)
    assert profile["decode_step"]["base_s"] == pytest.approx(0.008, rel=0.15)
    assert profile["decode_step"]["per_sequence_s"] == pytest.approx(0.001, rel=0.15)
    assert (profile["batch_max"], profile["concurrency"]) == (8, 8)
    # Eight at once take 8 · 0.025 s + 100 · 0.016 s, and each is half a reference request.
    assert profile["units"] == pytest.approx(8 / (0.2 + 1.6) / 2, rel=0.15)
    used = client.get("/api/v1/deployments/fast").json()
    assert used["profile"] == "fast-llama"
    assert used["status"]["capacity"]["units"] == profile["units"]
    published = next(one for one in rig.snapshot().deployments if one.name == "fast")
    assert published.profile is not None
    assert published.profile.prefill_tokens_per_s == profile["prefill_tokens_per_s"]
    events = client.get("/api/v1/events", params={"kind": "Deployment", "name": "fast"}).json()["items"]
    assert any("until the engine queued some of 16 requests" in event["sentence"] for event in events)
    refused = client.delete("/api/v1/profiles/fast-llama")
    assert refused.status_code == 409
    assert "Deployment/fast" in refused.text


@pytest.mark.parametrize(("kind", "queue_max"), [("vllm", "0"), ("openai", "64")])
def test_an_engine_that_refuses_or_queues_in_silence_saturates(
    client: httpx2.Client, kind: str, queue_max: str
) -> None:
    speeds = ("--prefill-tokens-per-s", "40000", "--decode-base-s", "0.006")
    with engine("--model", "meta/llama", "--slots", "4", "--queue-max", queue_max, *speeds) as url:
        deploy(client, f"full-{kind}", url, engine=kind)
        job = ended(client, f"full-{kind}")
    assert job["state"] == "done", job["sentence"]
    assert job["profile"]["batch_max"] == 4
    assert job["profile"]["decode_step"]["base_s"] == pytest.approx(0.006, rel=0.15)
    assert job["profile"]["sku"] == "unknown"
    assert ("refused" if kind == "vllm" else "wait") in job["sentence"]
    assert (job["requests"] <= job["requests_max"], job["share"]) == (True, 1.0)


def test_a_dry_run_sends_nothing_and_says_what_would_be_sent(
    rig: ControlRig, client: httpx2.Client, slow_engine: str
) -> None:
    deploy(client, "slow", slow_engine)
    before = metric(slow_engine, "vllm:prompt_tokens_total")
    plan = client.post(PATH.format("slow"), json={**SMALL, "dry_run": True}).json()
    assert sum(one["at_once"] for one in plan["rounds"]) == plan["requests_max"] <= 60
    words = ("calibrate", "slow", "--dry-run", "--max-requests", "60", "--data-dir", str(rig.data_dir))
    told = run(*words)
    assert "Nothing was sent." in told.stdout
    assert json.loads(run(*words, "-o", "json").stdout)["requests_max"] <= 60
    assert metric(slow_engine, "vllm:prompt_tokens_total") == before
    assert client.get(PATH.format("slow")).json() == {"items": []}


def test_what_cannot_be_calibrated_is_refused_with_a_sentence(client: httpx2.Client, slow_engine: str) -> None:
    deploy(client, "slow", slow_engine)
    deploy(client, "gone", "http://127.0.0.1:9/v1")
    for name, order, status, says in (
        ("none", {}, 404, "there is no Deployment"),
        ("slow", {"model": "lama"}, 422, "did you mean `llama`?"),
        ("slow", {"tokens_max": 100}, 422, "raise --max-requests"),
        ("slow", {"requests_max": "many"}, 422, "requests_max"),
        ("gone", {}, 409, "does not accept a connection"),
    ):
        answer = client.post(PATH.format(name), json=order)
        assert (answer.status_code, says in answer.text) == (status, True), answer.text
    assert client.get(f"{PATH.format('slow')}/nothing").status_code == 404


def test_a_deployment_in_use_is_left_alone_unless_told(
    rig: ControlRig, client: httpx2.Client, slow_engine: str
) -> None:
    deploy(client, "slow", slow_engine)
    slot = next(one.slot for one in rig.snapshot().deployments if one.name == "slow")
    cell = slot * rig.board.workers
    rig.board.in_flight[cell] = 3
    try:
        refused = client.post(PATH.format("slow"), json=SMALL)
        assert (refused.status_code, "3 requests are in flight" in refused.text) == (409, True)
        forced = client.post(PATH.format("slow"), json={**SMALL, "force": True})
        assert forced.status_code == 202
        path = f"{PATH.format('slow')}/{forced.json()['id']}"
        assert "already" in client.post(PATH.format("slow"), json={**SMALL, "force": True}).text
        assert client.delete(path).json()["state"] == "cancelled"
    finally:
        rig.board.in_flight[cell] = 0
    wait_for(lambda: metric(slow_engine, "vllm:num_requests_running") == 0)
    begun = client.post(PATH.format("slow"), json=SMALL).json()
    path = f"{PATH.format('slow')}/{begun['id']}"
    wait_for(lambda: client.get(path).json()["requests"] > 0)
    rig.board.in_flight[cell] = 1
    try:
        wait_for(lambda: client.get(path).json()["state"] == "failed")
    finally:
        rig.board.in_flight[cell] = 0
    assert "1 client request arrived during the sweep; wait until it is idle" in client.get(path).json()["sentence"]
    assert has_no_profile(client, "slow-llama")


def test_requests_of_others_at_the_engine_are_seen(client: httpx2.Client, slow_engine: str) -> None:
    deploy(client, "slow", slow_engine)
    body = {"model": "meta/llama", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2000, "stream": True}
    with httpx2.stream("POST", f"{slow_engine}/chat/completions", json=body, trust_env=False):
        refused = client.post(PATH.format("slow"), json=SMALL)
    assert (refused.status_code, "its engine has 1 requests" in refused.text) == (409, True)
    wait_for(lambda: metric(slow_engine, "vllm:num_requests_running") == 0)


def test_ctrl_c_cancels_and_leaves_nothing(rig: ControlRig, client: httpx2.Client, slow_engine: str) -> None:
    deploy(client, "slow", slow_engine)
    count = len(client.get(PATH.format("slow")).json()["items"])
    words = [*COMMAND, "calibrate", "slow", "--data-dir", str(rig.data_dir)]

    def as_in_a_terminal() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # shells take it from what they run in the background

    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, preexec_fn=as_in_a_terminal)

    def jobs() -> list[dict[str, Any]]:
        return list(client.get(PATH.format("slow")).json()["items"])[count:]

    wait_for(lambda: bool(jobs()) and jobs()[0]["requests"] > 0)
    time.sleep(0.1)  # the CLI has its answer and looks for the first time
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=20)
    assert process.returncode == 1, told
    assert "was cancelled; nothing was written" in told
    assert jobs()[0]["state"] == "cancelled"
    assert has_no_profile(client, "slow-llama")
    wait_for(lambda: metric(slow_engine, "vllm:num_requests_running") == 0)


def test_a_wrong_credential_is_named(client: httpx2.Client) -> None:
    assert client.put("/api/v1/secrets/token", json={"value": "right"}).is_success
    speeds = ("--prefill-tokens-per-s", "0", "--decode-base-s", "0.004")
    with engine("--model", "meta/llama", "--api-key", "right", "--slots", "1", *speeds) as url:
        deploy(client, "closed", url)
        assert "refused the credential (401)" in ended(client, "closed")["sentence"]
        deploy(client, "closed", url, credential={"secret": "token"})
        job = ended(client, "closed")
    assert (job["state"], job["profile"]["batch_max"], job["profile"]["concurrency"]) == ("done", 1, 1)


class _Fixed(BaseHTTPRequestHandler):
    """An engine with vLLM's metrics page and always the same answer."""

    kind = "application/json"
    body = b'{"choices": []}'

    def do_GET(self) -> None:
        self._answer(b'vllm:cache_config_info{block_size="16",num_gpu_blocks="1000"} 1.0\n', "text/plain")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._answer(self.body, self.kind)

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""


@contextmanager
def fixed(kind: str, body: bytes) -> Iterator[int]:
    """The port of an engine that always answers the same."""
    handler = type("Handler", (_Fixed,), {"kind": kind, "body": body})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


def chunk(delta: dict[str, Any], **more: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta, **more}]}).encode() + b"\n\n"


DELTAS = chunk({"role": "assistant", "content": ""}) + chunk({"content": "a"}) + chunk({"reasoning_content": "b"})
USAGE = {"prompt_tokens": 500, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 480}}
END = (
    chunk({}, finish_reason="length")
    + b"data: "
    + json.dumps({"choices": [], "usage": USAGE}).encode()
    + b"\n\ndata: [DONE]\n\n"
)


def asked(port: int) -> tuple[MeasuredResponse, int]:
    """One answer, and the KV cache's tokens."""

    async def both() -> tuple[MeasuredResponse, int]:
        endpoint = Endpoint(slot=0, scheme="http", host="127.0.0.1", port=port, base_path="/v1")
        target = CalibrationTarget(endpoint=endpoint, engine="vllm", upstream_model="m", ranges=None)
        client = CalibrationClient(target, await dialable_address(target))
        try:
            return await client.send(500, 7), await client.kv_tokens()
        finally:
            await client.close()

    return asyncio.run(both())


def test_an_answer_is_read_with_its_cached_tokens_taken_off() -> None:
    with fixed("text/event-stream", DELTAS + END) as port:
        answer, kv_tokens = asked(port)
    assert (answer.uncached_tokens, answer.output_tokens, answer.counted) == (20, 7, True)
    assert len(answer.events_s) == 2, "a role and a finish are no tokens"
    assert answer.sent_s < answer.events_s[0] <= answer.events_s[1] <= answer.ended_s
    assert kv_tokens == 16_000


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (DELTAS, "before its"),
        (b"data: [DONE]\n\n", "without content"),
        (DELTAS + b'data: {"error": {"message": "out of memory"}}\n\n', "out of memory"),
    ],
)
def test_a_broken_stream_is_no_measurement(body: bytes, says: str) -> None:
    with fixed("text/event-stream", body) as port, pytest.raises(RequestFailed, match=says):
        asked(port)


def test_an_engine_that_does_not_stream_is_named(client: httpx2.Client) -> None:
    with fixed("application/json", b'{"choices": []}') as port:
        deploy(client, "whole", f"http://127.0.0.1:{port}/v1")
        job = ended(client, "whole")
    assert (job["state"], "only an engine that streams" in job["sentence"]) == ("failed", True)


def test_an_address_outside_the_ranges_is_not_dialled(tmp_path: Path, slow_engine: str) -> None:
    with ControlRig(tmp_path / "data") as rig, rig.client() as client:
        deploy(client, "slow", slow_engine)
    with ControlRig(tmp_path / "data", egress_allow=["10.0.0.0/8"]) as rig, rig.client() as client:
        refused = client.post(PATH.format("slow"), json=SMALL)
    assert (refused.status_code, "--egress-allow" in refused.text) == (409, True)
