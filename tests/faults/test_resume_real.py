"""A real llama.cpp engine is killed while it answers: the client's answer is the one it would have had."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import openai
import pytest

from fleetgate.ipc.shared_memory import EndpointSignal
from tests.loopback.rig import Rig, deployment, gateway
from tests.waiting import wait_for

MODEL = "smollm2-135m"
TOKENS_MAX = 48
QUESTION = "Write a short story about a lighthouse keeper: é, ü and 😀 may be in it."


@contextmanager
def killable() -> Iterator[tuple[int, int]]:
    """A real engine: its process and port. It may be gone at the end."""
    argv = [sys.executable, "-m", "fleetgate.engine", "--listen", "127.0.0.1:0", "--llamacpp", "smollm2"]
    process = subprocess.Popen([*argv, "--slots", "2"], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    try:
        port = urlsplit(process.stdout.readline().split()[-1]).port
        assert port is not None
        yield process.pid, port
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with Rig(tmp_path_factory.mktemp("rig")) as made:
        yield made


@pytest.fixture(scope="module")
def standing() -> Iterator[int]:
    """The port of the engine that lives on."""
    with killable() as (_, port):
        yield port


def use(rig: Rig, ports: list[int], first_slot: int) -> None:
    """A Deployment for each engine, in this order."""
    made = [
        deployment(name, port, first_slot + place, models={MODEL: MODEL}, engine="llamacpp")
        for place, (name, port) in enumerate(zip(("one", "two"), ports, strict=True))
    ]
    rig.publish(gateways=(gateway("one", "two"),), deployments=tuple(made))
    rig.wait_until_used()


def stream(rig: Rig, temperature: float, kill: tuple[int, int] | None) -> tuple[str, str | None, set[str], int]:
    """What a client of the official SDK reads: text, finish_reason, ids and tokens. Shape: `kill` is who after what."""
    text, reason, ids, tokens, seen = "", None, set(), 0, 0
    with openai.OpenAI(base_url=f"http://127.0.0.1:{rig.port}/v1", api_key="any", max_retries=0) as sdk:
        for chunk in sdk.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=TOKENS_MAX,
            temperature=temperature,
            stream=True,
            stream_options={"include_usage": True},
        ):
            ids.add(chunk.id)
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reason = choice.finish_reason or reason
                seen += bool(choice.delta.content)
            if kill is not None and seen == kill[1]:
                os.kill(kill[0], signal.SIGKILL)
                kill = None
    return text, reason, ids, tokens


@pytest.mark.parametrize("after", [1, 2, 3, 7, 15, 30, 46])
def test_a_greedy_answer_survives_kill_9_exactly(rig: Rig, standing: int, after: int) -> None:
    with killable() as (pid, port):
        use(rig, [standing, standing], 200 + 4 * after)
        expected = stream(rig, 0.0, None)
        use(rig, [port, standing], 202 + 4 * after)
        text, reason, ids, tokens = stream(rig, 0.0, (pid, after))
    assert (text, reason, tokens) == (expected[0], expected[1], expected[3])
    assert len(ids) == 1 and len(text) > after


def test_a_sampled_answer_survives_kill_9(rig: Rig, standing: int) -> None:
    with killable() as (pid, port):
        use(rig, [port, standing], 400)
        wait_for(lambda: rig.board.signal(401, EndpointSignal.PREFILL) != 0, 60)
        assert rig.board.signal(401, EndpointSignal.PREFILL) == 1, "llama.cpp goes on with what another had begun"
        rig.wait_a_look()
        text, reason, ids, tokens = stream(rig, 0.8, (pid, 10))
    assert reason in ("stop", "length") and len(ids) == 1
    assert tokens == TOKENS_MAX or reason == "stop"
    assert len(text) > 40
