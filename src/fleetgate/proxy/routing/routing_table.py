"""A Snapshot made ready for requests: every look-up a dict, every head a template."""

from collections.abc import Callable, Collection

import msgspec

from fleetgate.core.admission.request_queue import DrainRate
from fleetgate.core.admission.retry_budget import KeyBudget, RetryBudget
from fleetgate.core.health.circuit_breaker import BreakerState, current_state
from fleetgate.core.health.hedge_policy import HedgeThreshold
from fleetgate.core.health.timeouts import StreamTiming
from fleetgate.core.model import Deployment, Endpoint, Gateway, Key, Snapshot
from fleetgate.core.routing.prefix_affinity import PrefixAffinity
from fleetgate.core.routing.route import ModelRoute, RejectionReason, model_routes
from fleetgate.core.routing.scheduler import Scheduler
from fleetgate.core.routing.strategies import Candidate
from fleetgate.ipc.sealed_secret import unseal
from fleetgate.policies.body_fields import BodyReader
from fleetgate.policies.policy_set import CompiledPolicies
from fleetgate.protocols.clients.openai import OPERATIONS, USAGE_ENGINES, models_body
from fleetgate.protocols.resume.transcript import ResumeMethod
from fleetgate.proxy.downstream.server_tls import UpstreamTls
from fleetgate.proxy.telemetry.metrics import WorkerMetrics
from fleetgate.proxy.telemetry.request_metrics import RequestMetrics
from fleetgate.proxy.transport.connection_pool import EgressRule, EndpointState
from fleetgate.proxy.transport.response_relay import ModelNames

ANY_ENGINE = frozenset({ResumeMethod.REPLAY, ResumeMethod.TOKENS})
EVERY_WAY = frozenset(ResumeMethod)
KEYS_MAX = 8192  # budgets of keys, the revoked among them; past it all begin anew
HOPE_S = 1.0  # with nobody up, a request waits so long for what a trial shows. FAULTS.md row 19
CARRIED_MIN = 8  # requests that an engine of which nothing is known surely takes


class DeploymentState:
    """A Deployment as requests use it: its Peers, what its engine calls the models, and its answers' fixed headers."""

    def __init__(
        self, deployment: Deployment, peers: list[EndpointState], heads: dict[int, dict[bytes, bytes]]
    ) -> None:
        self.deployment = deployment
        self.slot = deployment.slot
        self.peers = peers
        self.fit = 1.0  # the last answer of `health`: the sweep and every change of a breaker renew it
        self.limit = deployment.concurrency_max  # as it is now; 0 for none. Renewed with what was learned
        self.foreign = 0  # requests at the engine that others sent; 0 where that is not known or not fresh
        self.heads = heads  # by Endpoint slot, then path: the request head up to what differs from request to request
        self.pulse = StreamTiming()
        self.paused = False  # no request is sent to it before `cools_until_s`
        self.cools_until_s = 0.0  # until when its engine has asked to be left alone
        self.cools_told_ms = 0  # the last such moment that was heard of, here or from another worker
        self.carried = (
            CARRIED_MIN  # requests it had in flight when an Endpoint of it went out: a limit for the way back
        )
        self.refusals = 0  # of its credential, in a row
        self.ended, self.proven_s = 0, float("-inf")  # answers that went well, and when one last did
        self.lanes: list[list[DeploymentState]] = []  # for each Lane that lists it, the others there
        self.prefills = False  # whether its engine was seen to go on with what another had begun
        self.token_mark = 0  # whose token ids its engine gives and takes, 0 where that is not known
        self.adds_usage = deployment.engine in USAGE_ENGINES
        self.upstream_names = deployment.models
        names = (msgspec.json.encode(deployment.name), msgspec.json.encode(deployment.region))
        self.log_names = b'"deployment":%b,"region":%b' % names
        self.answer_headers = b"x-fleetgate-deployment: %b\r\nx-fleetgate-region: %b\r\n" % (
            deployment.name.encode(),
            deployment.region.encode(),
        )

    def remember(self, before: "DeploymentState") -> None:
        """The same Deployment in an older Snapshot: what is known of it."""
        self.pulse, self.prefills, self.token_mark = before.pulse, before.prefills, before.token_mark
        self.paused = before.paused
        self.cools_until_s, self.cools_told_ms = before.cools_until_s, before.cools_told_ms
        self.carried, self.refusals = before.carried, before.refusals
        self.ended, self.proven_s = before.ended, before.proven_s

    def renew_fit(self, now_s: float) -> None:
        """Work out the fit share of its Endpoints, 0 to 1."""
        peers = self.peers
        self.fit = sum(peer.fitness(now_s) for peer in peers) / len(peers) if peers else 0.0

    @property
    def is_denied(self) -> bool:
        """Whether its engine refuses our credential."""
        return all(peer.health.breaker is BreakerState.DENIED for peer in self.peers)

    def share(self, now_s: float) -> float:
        """The share of its limit that it may have: on its way back less than all, where others can take the rest."""
        if self.fit >= 1.0 or not self.lanes or not all(any(p.fit >= 1.0 for p in lane) for lane in self.lanes):
            return 1.0
        fitness = [share for peer in self.peers if (share := peer.fitness(now_s)) > 0.0]
        return sum(fitness) / len(fitness) if fitness else 1.0

    def fit_peers(self, now_s: float) -> list[EndpointState]:
        """Its Endpoints that may be tried now."""
        return [peer for peer in self.peers if peer.fitness(now_s) > 0.0]

    def peer_at(self, endpoint_slot: int) -> EndpointState | None:
        """The Endpoint of a slot."""
        return next((peer for peer in self.peers if peer.endpoint.slot == endpoint_slot), None)

    def choose(self, now_s: float, without: tuple[EndpointState, ...] = ()) -> EndpointState | None:
        """The fit Endpoint with the least of this worker's requests, leaving some out."""
        if len(self.peers) == 1 and not without:
            return self.peers[0] if self.fit > 0.0 else None
        fit = [peer for peer in self.peers if peer not in without and peer.fitness(now_s) > 0.0]
        return min(fit, key=lambda peer: peer.in_flight) if fit else None


class ModelRouteState:
    """One model in one Gateway with what changes from request to request."""

    def __init__(self, model: str, lane: ModelRoute, site: "GatewayState", tables: "RoutingTable") -> None:
        self.tables = tables
        self.model = model
        self.model_json = msgspec.json.encode(model)
        self.same_name = ModelNames(self.model_json, self.model_json)
        self.log_names = b'"gateway":%b,"model":%b' % (msgspec.json.encode(site.gateway.name), self.model_json)
        self.lane = lane
        self.site = site
        self.desk = Scheduler(site.gateway, lane)
        self.room = self.desk.queue
        self.candidates = lane.candidates
        self.places = [tables.places[candidate.slot] for candidate in lane.candidates]
        # Who turned out not to have the model at a path, and until when that is believed: no engine has all paths.
        self.missing: dict[tuple[int, bytes], float] = {}
        self.hedges = site.gateway.resilience.hedge != "off"
        self.lead = self._lead(tables)
        # With a single Endpoint there is nobody to prefer, and nothing worth remembering of a prompt.
        self.has_choice = sum(len(tables.places[c.slot].peers) for c in lane.candidates) > 1
        self.resumes = self.has_choice and site.gateway.resilience.resume == "auto"
        self.first_tokens = HedgeThreshold()
        self.affinity = PrefixAffinity()
        self.drain = DrainRate()
        self.meters: dict[int, RequestMetrics] = {}

    def lacks(self, slot: int, path: bytes, until_s: float) -> None:
        """A Deployment says that it does not have this model, or this path."""
        self.missing[slot, path] = until_s
        self.lead = None  # it is asked no more without a look at who is left

    def lacking(self, path: bytes, now_s: float) -> list[int]:
        """Who is not asked for this model there; nobody, where that would leave nobody."""
        self.missing = {what: until_s for what, until_s in self.missing.items() if until_s > now_s}
        if not self.missing:
            self.lead = self._lead(self.tables)
        slots = [slot for slot, lacked in self.missing if lacked == path]
        return slots if len(slots) < len(self.candidates) else []

    def why(self, reason: RejectionReason, tried: Collection[int], since_s: float, now_s: float) -> RejectionReason:
        """Why nobody can take a request that came at `since_s`, told by somebody who knows of those who are out."""
        if reason is RejectionReason.ALL_FULL:
            return reason
        after_s = now_s - HOPE_S
        for place in self.places if since_s > after_s else ():
            if place.slot not in tried and any(peer.trials and peer.trial_s > after_s for peer in place.peers):
                return RejectionReason.ON_TRIAL
        denied = reason is RejectionReason.NONE_UP and all(place.is_denied for place in self.places)
        return RejectionReason.DENIED if denied and self.places else reason

    def cools_s(self, now_s: float) -> float:
        """For how long every Deployment that is up has asked to be left alone; 0 where one has not."""
        up = [place for candidate in self.candidates if (place := self.tables.places[candidate.slot]).fit > 0.0]
        return max(0.0, min((place.cools_until_s - now_s for place in up), default=0.0))

    @property
    def ways(self) -> frozenset[ResumeMethod]:
        """How answers of this Lane can go on elsewhere."""
        places = self.tables.places
        return EVERY_WAY if any(places[c.slot].prefills for c in self.candidates) else ANY_ENGINE

    def _lead(self, tables: "RoutingTable") -> Candidate | None:
        """Whom requests may be given to without asking the strategy, up to its limit.

        Only where no Profile predicts, no policy has a say and nothing is hedged: then there is nothing to weigh.
        """
        lead = self.lane.lead
        if lead is None or self.hedges or not self.site.rules.is_empty or lead.overflow_at < 1.0:
            return None
        return lead if tables.places[lead.slot].deployment.profile is None else None


class GatewayState:
    """A Gateway as requests meet it."""

    def __init__(
        self, gateway: Gateway, lanes: dict[str, ModelRoute], before: "GatewayState | None", tables: "RoutingTable"
    ) -> None:
        self.gateway = gateway
        ratio = gateway.resilience.retry_budget
        same = before is not None and before.gateway.resilience.retry_budget == ratio
        self.budget: RetryBudget = before.budget if before is not None and same else RetryBudget(ratio, tables.made_s)
        self._key_budgets: dict[str, KeyBudget] = before._key_budgets if before is not None and same else {}
        self._made_s = tables.made_s
        self.rules = CompiledPolicies.compile(gateway, tables.snapshot.deployments)
        self.body_reader = BodyReader(self.rules.needs_body)
        self.lanes = {model: ModelRouteState(model, lane, self, tables) for model, lane in lanes.items()}
        self.models_body = models_body(dict.fromkeys(lanes, "fleetgate"))

    def budget_of(self, key: str) -> KeyBudget:
        """The further attempts that requests of one key may make."""
        known = self._key_budgets.get(key)
        if known is None:
            if len(self._key_budgets) >= KEYS_MAX:
                self._key_budgets.clear()
            own = RetryBudget(self.gateway.resilience.retry_budget, self._made_s)
            known = self._key_budgets[key] = KeyBudget(self.budget, own)
        return known


class RoutingTable:
    """Everything a worker looks up, made from one Snapshot and, where they stay the same, the Peers of the last."""

    def __init__(
        self, snapshot: Snapshot, maker: "RoutingTableBuilder", last: "RoutingTable | None", now_s: float
    ) -> None:
        self.snapshot = snapshot
        self.version = snapshot.version
        self.made_s = now_s
        self.keys: dict[str, Key] = {key.id: key for key in snapshot.keys}
        self.key_memo: dict[bytes, Key | None] = {}
        peers = last.peers if last else {}
        self.peers: dict[tuple[Endpoint, str, bool], EndpointState] = {}
        self.places: dict[int, DeploymentState] = {}
        for deployment in snapshot.deployments:
            place = self.places[deployment.slot] = self._place(deployment, maker, peers, snapshot.egress_allow)
            place.renew_fit(now_s)
            known = last.places.get(deployment.slot) if last else None
            if known is not None and known.deployment == deployment:
                place.remember(known)
        self.places_of: dict[EndpointState, list[DeploymentState]] = {}
        for place in self.places.values():
            for peer in place.peers:
                self.places_of.setdefault(peer, []).append(place)
        self.fit_changed: Callable[[DeploymentState], None] = lambda place: None
        self.sites: dict[bytes, GatewayState] = {}
        self.lanes: list[ModelRouteState] = []
        self.default: GatewayState | None = None
        for gateway in snapshot.gateways:
            self._add_site(gateway, maker, last)
        if self.default is None and len(self.sites) == 1:
            self.default = next(iter(self.sites.values()))

    def _add_lanes(self, site: GatewayState) -> None:
        for lane in site.lanes.values():
            self.lanes.append(lane)
            for place in lane.places:
                place.lanes.append([other for other in lane.places if other is not place])

    def record_decisions(self) -> None:
        """Keep every decision for `--record`; a ModelRoute's lead gets no request without a decision."""
        for site in self.sites.values():
            for lane in site.lanes.values():
                lane.lead = None
                lane.desk.records_decisions = True

    def try_out(self, peer: EndpointState, now_s: float) -> bool:
        """A real request goes to an Endpoint that was out; whether that one is half open, and this its trial."""
        if current_state(peer.health, now_s) is not BreakerState.HALF_OPEN:
            return False
        peer.trials += 1
        peer.trial_s = now_s
        self.renew_fit(peer, now_s)
        return True

    def tried_out(self, peer: EndpointState, now_s: float, well: bool) -> None:
        """A trial has brought content, or ended without any: the next may go there."""
        peer.trials -= 1
        peer.shown += well
        self.renew_fit(peer, now_s)

    def renew_fit(self, peer: EndpointState, now_s: float) -> None:
        """A Peer's breaker or trial changed."""
        for place in self.places_of.get(peer, ()):
            place.renew_fit(now_s)
            self.fit_changed(place)

    def lane_after(self, old: ModelRouteState) -> ModelRouteState:
        """The Lane that took the place of one from an older Snapshot; an empty one where the model is gone."""
        site = self.sites.get(old.site.gateway.host.encode())
        lane = site.lanes.get(old.model) if site is not None else None
        return lane or ModelRouteState(old.model, ModelRoute((), old.lane.strategy), old.site, self)

    def _place(
        self,
        deployment: Deployment,
        maker: "RoutingTableBuilder",
        peers: dict[tuple[Endpoint, str, bool], EndpointState],
        egress: tuple[str, ...],
    ) -> DeploymentState:
        chosen: list[EndpointState] = []
        heads: dict[int, dict[bytes, bytes]] = {}
        credential = maker.open_credential(deployment)
        for endpoint in deployment.endpoints:
            identity = (endpoint, ",".join(egress) if deployment.egress_checked else "", deployment.egress_checked)
            peer = peers.get(identity) or maker.peer(endpoint, egress if deployment.egress_checked else None)
            self.peers[identity] = peer
            chosen.append(peer)
            heads[endpoint.slot] = {
                path: request_head(endpoint, operation.path, credential) for path, operation in OPERATIONS.items()
            }
        return DeploymentState(deployment, chosen, heads)

    def _add_site(self, gateway: Gateway, maker: "RoutingTableBuilder", last: "RoutingTable | None") -> None:
        before = last.sites.get(gateway.host.encode()) if last else None
        site = GatewayState(gateway, model_routes(gateway, self.snapshot, maker.region), before, self)
        for model, lane in site.lanes.items():
            if before is not None and model in before.lanes:
                lane.desk.turn = before.lanes[model].desk.turn
                lane.drain = before.lanes[model].drain
                lane.affinity = before.lanes[model].affinity
                lane.first_tokens = before.lanes[model].first_tokens
            for candidate in lane.lane.candidates:
                lane.meters[candidate.slot] = maker.meters(gateway.name, candidate.name, candidate.region)
        self.sites[gateway.host.encode()] = site
        self._add_lanes(site)
        if gateway.default:
            self.default = site


class RoutingTableBuilder:
    """Makes the parts of Tables that need this machine: TLS, secrets, metric cells."""

    def __init__(self, telemetry: WorkerMetrics, region: str, seal_key: Callable[[], bytes]) -> None:
        self.region = region
        self._telemetry = telemetry
        self._seal_key = seal_key
        self.upstream_tls: UpstreamTls | None = None
        self._meters: dict[tuple[str, str, str], RequestMetrics] = {}

    def meters(self, gateway: str, deployment: str, region: str) -> RequestMetrics:
        """The metric cells of a Gateway and Deployment."""
        names = (gateway, deployment, region)
        if names not in self._meters:
            self._meters[names] = RequestMetrics(self._telemetry, *names)
        return self._meters[names]

    def peer(self, endpoint: Endpoint, egress: tuple[str, ...] | None) -> EndpointState:
        """A new Peer."""
        tls = None
        if endpoint.scheme == "https":
            tls = self.upstream_tls = self.upstream_tls or UpstreamTls()
        return EndpointState(
            endpoint, tls, EgressRule(egress, endpoint.scheme == "https") if egress is not None else None
        )

    def open_credential(self, deployment: Deployment) -> str:
        """The credential for a Deployment's origins, or an empty string."""
        if not deployment.credential:
            return ""
        return unseal(deployment.credential, self._seal_key(), deployment.name)


def request_head(endpoint: Endpoint, path: bytes, credential: str) -> bytes:
    """The head of a request to an Endpoint, up to what differs from request to request.

    The one place where a credential is attached: to the head of the origin it belongs to. FAULTS.md row 79.
    The type is ours, not the client's: each body was read as JSON, and `curl -d` calls it a form, which vLLM refuses.
    """
    default = {"http": 80, "https": 443}[endpoint.scheme]
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    if endpoint.port != default:
        host = f"{host}:{endpoint.port}"
    authorization = f"authorization: Bearer {credential}\r\n" if credential else ""
    return (
        f"POST {endpoint.base_path}{path.decode()} HTTP/1.1\r\nhost: {host}\r\nuser-agent: fleetgate\r\n"
        f"accept-encoding: identity\r\ncontent-type: application/json\r\n{authorization}"
    ).encode()
