"""The load that engines report, read from texts as their servers write them."""

import pytest

from fleetgate.protocols import engines
from fleetgate.protocols.engines import EngineSignals, metric_sum

VLLM = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="meta-llama/Llama-3.3-70B-Instruct"} 12.0
vllm:num_requests_running{engine="1",model_name="meta-llama/Llama-3.3-70B-Instruct"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="meta-llama/Llama-3.3-70B-Instruct"} 4.0
vllm:num_requests_waiting{engine="1",model_name="meta-llama/Llama-3.3-70B-Instruct"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 99.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
"""
LLAMACPP = b"""# HELP llamacpp:requests_processing Number of requests processing.
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 2
llamacpp:requests_deferred 1
llamacpp:n_decode_total 512
"""


def test_vllm() -> None:
    engine = engines.find("vllm")
    assert engine is not None
    assert engine.read(VLLM) == EngineSignals(running=15, waiting=4, kv_ratio=0.25)
    old = VLLM.replace(b"kv_cache_usage_perc", b"gpu_cache_usage_perc")
    assert engine.read(old).kv_ratio == 0.25


def test_llamacpp() -> None:
    engine = engines.find("llamacpp")
    assert engine is not None
    assert engine.read(LLAMACPP) == EngineSignals(running=2, waiting=1)
    assert engine.read(LLAMACPP + b"llamacpp:kv_cache_usage_ratio 0.5\n").kv_ratio == 0.5


def test_engines_without_signals_have_no_file() -> None:
    assert engines.find("openai") is None
    assert engines.find("no-such-engine") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"", None),
        (b"other 5\n", None),
        (b"xload 5\n", None),
        (b"load_total 5\n", None),
        (b"# load 5\n", None),
        (b"load 5", 5.0),
        (b"load 5 1700000000\n", 5.0),
        (b'load 1e3\nload{a="b"} 1\n', 1001.0),
        (b'load{a="} 7",b="c"} 2\n', 2.0),
        (b"load NaN\n", None),
        (b"load +Inf\n", None),
        (b"load -Inf\nload 1\n", 1.0),
        (b"load e\n", None),
        (b"load 1.2.3\n", None),
        (b"load 1e30\n", None),
        (b"load \xff\n", None),
        (b"a 1\r\nload 2\r\n", 2.0),
    ],
)
def test_a_metric_is_summed_or_absent_and_never_an_error(text: bytes, value: float | None) -> None:
    assert metric_sum(text, b"load") == value
