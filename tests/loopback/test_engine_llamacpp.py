"""A real llama.cpp server started by `fleetgate engine --llamacpp`."""

import os
import signal
import subprocess
import sys

import openai

from fleetgate.protocols.engines import llamacpp
from tests.loopback.engines import engine, metric


def test_a_real_model_responds_through_the_sdk_and_reports_its_load() -> None:
    with (
        engine("--llamacpp", "smollm2", "--slots", "2") as url,
        openai.OpenAI(base_url=url, api_key="any", max_retries=0) as sdk,
    ):
        assert [model.id for model in sdk.models.list()] == ["smollm2-135m"]
        stream = sdk.chat.completions.create(
            model="smollm2-135m",
            messages=[{"role": "user", "content": "Say hello."}],
            max_tokens=5,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert chunks[-1].usage is not None
        assert 1 <= chunks[-1].usage.completion_tokens <= 5
        assert metric(url, "llamacpp:requests_processing") == 0
        page = sdk.with_options(base_url=url.removesuffix("/v1")).get(llamacpp.METRICS_PATH, cast_to=str)
        signals = llamacpp.read(page.encode())
        assert (signals.running, signals.waiting) == (0, 0)


def test_a_missing_package_is_an_error_with_the_fix() -> None:
    hide = (
        "import sys; sys.modules['xllamacpp'] = None; "
        "from fleetgate.engine.main import main; sys.exit(main(sys.argv[1:]))"
    )
    argv = [sys.executable, "-c", hide, "--listen", "127.0.0.1:0", "--llamacpp", "smollm2"]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert "run `make setup`" in run.stderr


def test_sigterm_ends_it_during_a_response() -> None:
    argv = [sys.executable, "-m", "fleetgate.engine", "--listen", "127.0.0.1:0", "--llamacpp", "smollm2"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as out:
        url = out.readline().split()[-1]
        with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as sdk:
            stream = sdk.completions.create(model="smollm2-135m", prompt="Once", max_tokens=500, stream=True)
            next(iter(stream))
            os.kill(process.pid, signal.SIGTERM)
            try:
                assert process.wait(10) == 0
            finally:
                process.kill()
