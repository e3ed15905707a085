"""A Snapshot prepared for requests: look-ups are dicts, heads are templates."""

from collections.abc import Callable

from fleetgate.core.health.circuit_breaker import BreakerState, current_state
from fleetgate.core.model import Deployment, Endpoint, Gateway, Key, Snapshot
from fleetgate.core.routing.route import ModelRoute, model_routes
from fleetgate.ipc.sealed_secret import unseal
from fleetgate.protocols import clients
from fleetgate.protocols.clients.base import ClientProtocol
from fleetgate.proxy.routing.deployment_state import DeploymentState
from fleetgate.proxy.routing.endpoint_state import EndpointState
from fleetgate.proxy.routing.model_route import GatewayState, ModelRouteState, TableParts
from fleetgate.proxy.telemetry.request_metrics import RequestMetricsCache
from fleetgate.proxy.transport.connection_pool import ConnectionPool
from fleetgate.proxy.transport.dns import EgressRule
from fleetgate.proxy.transport.upstream_tls import UpstreamTls

PROBE_PROTOCOL = "openai"  # the protocol of the resume probe
EndpointIdentity = tuple[Endpoint, str, bool]


class RoutingTable:
    """Everything that a worker looks up, built from one Snapshot.

    Endpoints that stay the same keep their state and connections. Shape: `deployments` are by slot, `gateways` by host;
    `on_health_change` is called with each Deployment when its health changes.
    """

    def __init__(
        self, snapshot: Snapshot, builder: "RoutingTableBuilder", last: "RoutingTable | None", now_s: float
    ) -> None:
        self.snapshot = snapshot
        self.version = snapshot.version
        self.keys: dict[str, Key] = {key.id: key for key in snapshot.keys}
        self.key_memo: dict[bytes, Key | None] = {}
        known_endpoints = last.endpoints if last else {}
        self.endpoints: dict[EndpointIdentity, EndpointState] = {}
        self.deployments: dict[int, DeploymentState] = {}
        self._protocols = [clients.find(name) for name in dict.fromkeys([PROBE_PROTOCOL, *_protocol_names(snapshot)])]
        for spec in snapshot.deployments:
            deployment = self._deployment(spec, builder, known_endpoints)
            self.deployments[spec.slot] = deployment
            deployment.update_health(now_s)
            known = last.deployments.get(spec.slot) if last else None
            if known is not None and known.spec == spec:
                deployment.inherit(known)
        self.deployments_at: dict[EndpointState, list[DeploymentState]] = {}
        for deployment in self.deployments.values():
            for endpoint in deployment.endpoints:
                self.deployments_at.setdefault(endpoint, []).append(deployment)
        self.gateways: dict[bytes, GatewayState] = {}
        self.routes: list[ModelRouteState] = []
        self.default_gateway: GatewayState | None = None
        self._parts = TableParts(self, self.deployments, snapshot.deployments, now_s)
        for gateway in snapshot.gateways:
            self._add_gateway(gateway, builder, last)
        if self.default_gateway is None and len(self.gateways) == 1:
            self.default_gateway = next(iter(self.gateways.values()))
        self.on_health_change: Callable[[DeploymentState], None] = builder.on_health_change

    def begin_trial(self, endpoint: EndpointState, now_s: float) -> bool:
        """Note that a request goes to an Endpoint. Returns whether it is a trial: the Endpoint is half open."""
        if current_state(endpoint.health, now_s) is not BreakerState.HALF_OPEN:
            return False
        endpoint.begin_trial(now_s)
        self.update_health(endpoint, now_s)
        return True

    def end_trial(self, endpoint: EndpointState, now_s: float, has_content: bool) -> None:
        """Note that a trial brought content, or ended without any: the next request may go there."""
        endpoint.end_trial(has_content)
        self.update_health(endpoint, now_s)

    def update_health(self, endpoint: EndpointState, now_s: float) -> None:
        """Update the Deployments of an Endpoint after a change of its breaker or trials."""
        for deployment in self.deployments_at.get(endpoint, ()):
            deployment.update_health(now_s)
            self.on_health_change(deployment)

    def successor(self, old: ModelRouteState) -> ModelRouteState:
        """The route that replaces one of an older Snapshot; without candidates if the model was removed."""
        gateway = self.gateways.get(old.gateway.spec.host.encode())
        route = gateway.routes.get(old.model) if gateway is not None else None
        return route or ModelRouteState(old.model, ModelRoute((), old.route.strategy), old.gateway, self._parts)

    def _deployment(
        self, spec: Deployment, builder: "RoutingTableBuilder", known: dict[EndpointIdentity, EndpointState]
    ) -> DeploymentState:
        endpoints: list[EndpointState] = []
        heads: dict[int, dict[ClientProtocol, dict[bytes, bytes]]] = {}
        egress = self.snapshot.egress_allow if spec.egress_checked else None
        credential = builder.open_credential(spec)
        for endpoint in spec.endpoints:
            identity = (endpoint, ",".join(egress) if egress is not None else "", spec.egress_checked)
            state = known.get(identity) or builder.endpoint(endpoint, egress)
            self.endpoints[identity] = state
            endpoints.append(state)
            heads[endpoint.slot] = {
                protocol: request_heads(protocol, endpoint, credential) for protocol in self._protocols
            }
        return DeploymentState(spec, endpoints, heads)

    def _add_gateway(self, spec: Gateway, builder: "RoutingTableBuilder", last: "RoutingTable | None") -> None:
        before = last.gateways.get(spec.host.encode()) if last else None
        gateway = GatewayState(spec, model_routes(spec, self.snapshot, builder.region), before, self._parts)
        for model, route in gateway.routes.items():
            if before is not None and model in before.routes:
                route.inherit(before.routes[model])
            if builder.records_decisions:
                route.record_decisions()
            for candidate in route.route.candidates:
                route.metrics[candidate.slot] = builder.metrics.get(spec.name, candidate.name, candidate.region)
            self.routes.append(route)
            for deployment in route.deployments:
                deployment.alternatives.append([other for other in route.deployments if other is not deployment])
        self.gateways[spec.host.encode()] = gateway
        if spec.default:
            self.default_gateway = gateway


class RoutingTableBuilder:
    """Builds the parts of routing tables that depend on the machine: TLS, secrets, metrics.

    Shape: with `records_decisions` (`--record`) the scheduler makes every decision.
    """

    def __init__(
        self,
        metrics: RequestMetricsCache,
        region: str,
        seal_key: Callable[[], bytes],
        on_health_change: Callable[[DeploymentState], None],
        records_decisions: bool = False,
    ) -> None:
        self.region = region
        self.metrics = metrics
        self.on_health_change = on_health_change
        self.records_decisions = records_decisions
        self._seal_key = seal_key
        self.upstream_tls: UpstreamTls | None = None

    def endpoint(self, endpoint: Endpoint, egress: tuple[str, ...] | None) -> EndpointState:
        """The state of a new Endpoint. Shape: `egress` are the ranges it may be in, None for anywhere."""
        tls = None
        if endpoint.scheme == "https":
            tls = self.upstream_tls = self.upstream_tls or UpstreamTls()
        rule = EgressRule(egress, endpoint.scheme == "https") if egress is not None else None
        return EndpointState(endpoint, ConnectionPool(endpoint, tls, rule))

    def open_credential(self, deployment: Deployment) -> str:
        """The credential for a Deployment's origins, or an empty string."""
        if not deployment.credential:
            return ""
        return unseal(deployment.credential, self._seal_key(), deployment.name)


def _protocol_names(snapshot: Snapshot) -> list[str]:
    return [gateway.protocol for gateway in snapshot.gateways]


def request_heads(protocol: ClientProtocol, endpoint: Endpoint, credential: str) -> dict[bytes, bytes]:
    """The part of the head that all requests to an Endpoint share, by the client's path.

    A credential is added here only, to the heads of its own origin. faults.md row 79.
    The content type is always JSON, as the body was read: `curl -d` sends the type of a form, which vLLM refuses.
    """
    default = {"http": 80, "https": 443}[endpoint.scheme]
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    if endpoint.port != default:
        host = f"{host}:{endpoint.port}"
    fields = (
        f" HTTP/1.1\r\nhost: {host}\r\nuser-agent: fleetgate\r\n"
        "accept-encoding: identity\r\ncontent-type: application/json\r\n"
    ).encode() + protocol.credential_lines(credential)
    return {
        path: b"POST " + endpoint.base_path.encode() + operation.path + fields
        for path, operation in protocol.OPERATIONS.items()
    }
