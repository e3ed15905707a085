"""Metrics of requests: outcomes, latencies, tokens, and the error of token estimates."""

from fleetgate.proxy.telemetry.metrics import LatencyHistogram, WorkerMetrics


class RequestMetrics:
    """The metric cells of one Gateway and Deployment."""

    def __init__(self, metrics: WorkerMetrics, gateway: str, deployment: str, region: str) -> None:
        self._metrics = metrics
        self._labels = {"gateway": gateway, "deployment": deployment, "region": region}
        self.outcomes: dict[str, int] = {}
        self.ttft: LatencyHistogram = metrics.histogram("fleetgate_ttft_seconds", self._labels)
        self.tpot: LatencyHistogram = metrics.histogram("fleetgate_tpot_seconds", self._labels)
        self.duration: LatencyHistogram = metrics.histogram("fleetgate_request_duration_seconds", self._labels)
        self.prompt_tokens = metrics.counter("fleetgate_tokens_total", {**self._labels, "kind": "prompt"})
        self.output_tokens = metrics.counter("fleetgate_tokens_total", {**self._labels, "kind": "output"})

    def outcome(self, outcome: str) -> int:
        """The cell that counts requests with this outcome."""
        index = self._metrics.counter("fleetgate_requests_total", {**self._labels, "outcome": outcome})
        self.outcomes[outcome] = index
        return index

    def failure(self, failure: str) -> int:
        """The cell that counts attempts with this failure."""
        return self._metrics.counter("fleetgate_attempt_failures_total", {**self._labels, "failure": failure})


class TokenEstimateError:
    """The error of token estimates. Shape: `kind` is `prompt` or `output`."""

    __slots__ = ("_cells", "_error", "_estimated")

    def __init__(self, metrics: WorkerMetrics, kind: str) -> None:
        self._cells = metrics.cells
        self._estimated = metrics.counter("fleetgate_estimated_tokens_total", {"kind": kind})
        self._error = metrics.counter("fleetgate_token_error_total", {"kind": kind})

    def record(self, estimated: float, tokens: int) -> None:
        """Count an estimate and the number that the engine reported."""
        self._cells[self._estimated] += int(estimated)
        self._cells[self._error] += int(abs(estimated - tokens))


class RequestMetricsCache:
    """The request metrics of one worker, made once for each Gateway and Deployment."""

    def __init__(self, metrics: WorkerMetrics) -> None:
        self._metrics = metrics
        self._known: dict[tuple[str, str, str], RequestMetrics] = {}

    def get(self, gateway: str, deployment: str, region: str) -> RequestMetrics:
        """The metrics of a Gateway and Deployment."""
        names = (gateway, deployment, region)
        known = self._known.get(names)
        if known is None:
            known = self._known[names] = RequestMetrics(self._metrics, *names)
        return known
