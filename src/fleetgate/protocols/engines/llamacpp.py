"""llama.cpp's server. It has `/metrics` only with `--metrics`; current builds do not report the use of the KV cache."""

from fleetgate.protocols.engines import EngineSignals, metric_sum

HEALTH_PATH = "/health"
METRICS_PATH = "/metrics"


def read(metrics: bytes) -> EngineSignals:
    """Requests in slots, requests that wait for one, and the use of the KV cache from older builds."""
    running = metric_sum(metrics, b"llamacpp:requests_processing")
    waiting = metric_sum(metrics, b"llamacpp:requests_deferred")
    return EngineSignals(
        running=None if running is None else int(running),
        waiting=None if waiting is None else int(waiting),
        kv_ratio=metric_sum(metrics, b"llamacpp:kv_cache_usage_ratio"),
    )
