"""The metrics page of a simulated engine, with the names of vLLM or of llama.cpp."""

from typing import Any

from fleetgate.engine.batch import Batch


class EngineCounts:
    """Counters of the server, beside those of the batch."""

    def __init__(self) -> None:
        self.disconnects = 0
        self.refusals = 0
        self.by_finish_reason = {"stop": 0, "length": 0, "tool_calls": 0}

    def finished(self, reason: str) -> None:
        """Count a response that was written completely."""
        self.by_finish_reason[reason] += 1


def _lines(kind: str, name: str, value: float, labels: str = "") -> list[str]:
    return [f"# TYPE {name} {kind}", f"{name}{labels} {value:g}" if kind == "gauge" else f"{name}{labels} {int(value)}"]


def _own(counts: EngineCounts) -> list[str]:
    return [
        *_lines("counter", "fleetgate_engine_client_disconnects_total", counts.disconnects),
        *_lines("counter", "fleetgate_engine_refusals_total", counts.refusals),
    ]


def vllm_metrics(batch: Batch[Any], counts: EngineCounts, model: str, kv_tokens: int) -> str:
    """The page with the names of vLLM. Units: KV use 0 to 1."""
    name = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    labels = f'{{engine="0",model_name="{name}"}}'
    lines = [
        *_lines("gauge", "vllm:num_requests_running", batch.running, labels),
        *_lines("gauge", "vllm:num_requests_waiting", batch.waiting, labels),
        *_lines("gauge", "vllm:kv_cache_usage_perc", min(1.0, batch.kv_tokens / kv_tokens), labels),
        *_lines("counter", "vllm:prompt_tokens_total", batch.prompt_tokens_total, labels),
        *_lines("counter", "vllm:generation_tokens_total", batch.output_tokens_total, labels),
        "# TYPE vllm:request_success_total counter",
    ]
    for reason, count in counts.by_finish_reason.items():
        lines.append(f'vllm:request_success_total{{engine="0",finished_reason="{reason}",model_name="{name}"}} {count}')
    return "\n".join([*lines, *_own(counts)]) + "\n"


def llamacpp_metrics(batch: Batch[Any], counts: EngineCounts, model: str, kv_tokens: int) -> str:
    """The page with the names of llama.cpp, without the model. Units: KV use 0 to 1."""
    lines = [
        *_lines("counter", "llamacpp:prompt_tokens_total", batch.prompt_tokens_total),
        *_lines("counter", "llamacpp:tokens_predicted_total", batch.output_tokens_total),
        *_lines("counter", "llamacpp:n_decode_total", batch.steps_total),
        *_lines("gauge", "llamacpp:kv_cache_usage_ratio", min(1.0, batch.kv_tokens / kv_tokens)),
        *_lines("gauge", "llamacpp:requests_processing", batch.running),
        *_lines("gauge", "llamacpp:requests_deferred", batch.waiting),
    ]
    return "\n".join([*lines, *_own(counts)]) + "\n"
