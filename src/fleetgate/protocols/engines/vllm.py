"""vLLM. It always has `/metrics`; the names are those of its V1 engine."""

from fleetgate.protocols.engines import EngineSignals, metric_sum

HEALTH_PATH = "/health"
METRICS_PATH = "/metrics"


def read(metrics: bytes) -> EngineSignals:
    """Running and waiting requests and the share of the KV cache in use, summed over the engine cores."""
    running = metric_sum(metrics, b"vllm:num_requests_running")
    waiting = metric_sum(metrics, b"vllm:num_requests_waiting")
    kv = metric_sum(metrics, b"vllm:kv_cache_usage_perc")
    if kv is None:
        kv = metric_sum(metrics, b"vllm:gpu_cache_usage_perc")  # the name before V1
    return EngineSignals(
        running=None if running is None else int(running),
        waiting=None if waiting is None else int(waiting),
        kv_ratio=kv,
    )
