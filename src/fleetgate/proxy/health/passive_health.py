"""The health of every Endpoint in one worker: what attempts, probes, looks and other workers tell, put together."""

import random
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from fleetgate.core.exchange import RETRY_AFTER_MAX_S, Failure, State
from fleetgate.core.health import outlier_detection as outliers
from fleetgate.core.health.circuit_breaker import (
    EJECTED_STATES,
    BreakerState,
    Signal,
    ejection_end_ms,
    encode_ejection,
    health_from_ejection,
    next_health,
)
from fleetgate.ipc.event_spool import EventRecord
from fleetgate.ipc.shared_memory import COUNTER_CELLS, DeploymentCounter
from fleetgate.proxy.health import event_messages as sentences
from fleetgate.proxy.routing.routing_table import DeploymentState, ModelRouteState, RoutingTable
from fleetgate.proxy.transport.connection_pool import EndpointState

if TYPE_CHECKING:
    from fleetgate.proxy.request.handler import RequestHandler
    from fleetgate.proxy.worker.services import Hub

LACKS_S = 30.0  # a model that an engine says it does not have is asked of it again after so long
PANIC_EVERY_S = 1.0  # with everybody out, each is tried so often by one request, the least bad first
TELL_EVERY_S = 30.0  # an Event of one kind of one Deployment
PROVEN_S = 10.0  # an engine that answered so lately does accept our credential: a 403 may be about the prompt
REFUSALS_MAX = 3  # such 403s in a row, and it does not
LOOK_MIN_S = 0.2  # of a stream that began since the last look; less tells nothing of its pace
SILENT_S = 2.0  # a request that waits at an Endpoint which its probes cannot reach has been lost with it

# What a failed attempt says about an Endpoint's health. What is missing here says nothing, or something else.
SIGNS = {
    Failure.BROKEN: Signal.BROKE,
    Failure.BAD_OUTPUT: Signal.BROKE,
    Failure.TIMEOUT: Signal.BROKE,
    Failure.UNREACHABLE: Signal.UNREACHABLE,
    Failure.TLS: Signal.UNREACHABLE,
}


class PassiveHealthChecker:
    """Feeds the breakers and sees to what follows from them."""

    def __init__(self, hub: "Hub") -> None:
        self._hub = hub
        self._out_s: dict[str, dict[str, float]] = {}  # by region, then origin: when an Endpoint of it last went out
        self._told_s: dict[tuple[int, str], float] = {}  # by Deployment slot and kind: when an Event was last told

    # --- what attempts tell ---

    def blame(self, conversation: "RequestHandler", peer: EndpointState, failure: Failure) -> None:
        """An attempt at this Endpoint is lost."""
        sign = SIGNS.get(failure)
        if sign is not None:
            self.saw(peer, sign)
            return
        places = self._hub.tables.places_of.get(peer, ())
        for place in places:
            if failure is Failure.CREDENTIAL:
                conversation.failed_peers = (*conversation.failed_peers, *place.peers)  # all would get the same one
                self._refused_credential(place)
            elif failure is Failure.MODEL_MISSING:
                self._lacks(conversation.lane, place, conversation.request.path)

    def unreachable(self, lane: ModelRouteState, place: DeploymentState, peer: EndpointState, failure: Failure) -> None:
        """A connection that nobody waits for any more could not be made."""
        self._hub.count_failure(lane, place, failure)
        self.saw(peer, SIGNS[failure])

    def saw(self, peer: EndpointState, sign: Signal) -> None:
        """Feed one sign to an Endpoint's breaker."""
        if peer.saw(sign, self._hub.clock(), random.random()):
            self.changed(peer, sign)

    def changed(self, peer: EndpointState, sign: Signal) -> None:
        """An Endpoint's breaker changed: write it where the other workers see it, and see to what follows."""
        hub, tables, health = self._hub, self._hub.tables, peer.health
        board = hub.board
        told = encode_ejection(health)
        board.ejected_until_ms[peer.endpoint.slot * board.workers + hub.config.index] = told
        peer.adopted = max(peer.adopted, told)
        if health.breaker in EJECTED_STATES:
            for place in tables.places_of.get(peer, ()):
                place.carried = max(place.carried, board.in_flight_total(place.slot))
                self.tell(place, str(health.breaker), sentences.out_sentence(peer.endpoint, health, sign, hub.clock()))
        tables.renew_fit(peer, hub.clock())
        if health.breaker in (BreakerState.CLOSED, BreakerState.HALF_OPEN):
            hub.loop.call_soon(hub.wake)
        elif health.breaker in (BreakerState.OPEN, BreakerState.DOWN):
            self._suspect_region(peer)
        if health.breaker is BreakerState.DOWN and sign is Signal.PROBE_BROKE:
            hub.loop.call_soon(self._sever, peer)

    def _sever(self, peer: EndpointState) -> None:
        """Its probes do not reach it: what still waits there for a first sign is moved, and need not wait as long."""
        now_s = self._hub.clock()
        for conversation in list(self._hub.conversations):
            waiting = conversation.exchange.state is State.TRYING and conversation.peer is peer
            if waiting and now_s - conversation.sent_s > SILENT_S:
                conversation.overdue(now_s)

    def _refused_credential(self, place: DeploymentState) -> None:
        """No Endpoint of the Deployment gets a request before the credential may be another. FAULTS.md row 21."""
        now_s = self._hub.clock()
        place.refusals += 1
        if now_s - place.proven_s <= PROVEN_S and place.refusals < REFUSALS_MAX:
            return
        for peer in place.peers:
            self.saw(peer, Signal.DENIED)

    def _lacks(self, lane: ModelRouteState, place: DeploymentState, path: bytes) -> None:
        """This Deployment does not have this model, whatever its entry says; others of its models it may. Row 20."""
        lane.lacks(place.slot, path, self._hub.clock() + LACKS_S)
        self.tell(place, "model_missing", sentences.lacks_sentence(place.deployment, lane.model, path.decode()))

    # --- full ---

    def asked_to_wait(self, place: DeploymentState, wait_s: float) -> None:
        """An engine is full and says for how long: nobody is sent there before. FAULTS.md row 16.

        Of several Endpoints one speaks for itself only; for the others their limit does.
        """
        if len(place.peers) > 1:
            return
        hub, now_s = self._hub, self._hub.clock()
        place.cools_until_s = max(place.cools_until_s, now_s + min(wait_s, RETRY_AFTER_MAX_S))
        place.cools_told_ms = int(place.cools_until_s * 1000)
        hub.board.retry_after_until_ms[place.slot * hub.board.workers + hub.config.index] = place.cools_told_ms
        self.cool(place, now_s)
        hub.learning.renew(place, int(now_s * 1000))

    def cool(self, place: DeploymentState, now_s: float) -> None:
        """Nobody is sent there while it cools; afterwards it is as before."""
        place.paused = now_s < place.cools_until_s
        if not place.paused:
            place.cools_until_s = 0.0

    # --- regions ---

    def _suspect_region(self, out: EndpointState) -> None:
        """Where much of a region falls at once the rest gets one request at a time, if others can take the load."""
        now_s, tables = self._hub.clock(), self._hub.tables
        for place in tables.places_of.get(out, ()):
            region = place.deployment.region
            moments_s = self._out_s.setdefault(region, {})
            moments_s[f"{place.deployment.name} at {out.endpoint.origin}"] = now_s
            there = [one for one in tables.places.values() if one.deployment.region == region]
            members = sum(len(one.peers) for one in there)
            if not outliers.is_region_lost(moments_s, members, now_s) or not self._has_other_region(there):
                continue
            suspects = [peer for one in there for peer in one.peers if peer.health.breaker is BreakerState.CLOSED]
            for peer in suspects:
                peer.health = next_health(peer.health, Signal.REGION_LOST, now_s)
                tables.renew_fit(peer, now_s)
            self.tell(place, "region_lost", sentences.region_sentence(region, moments_s, now_s))

    def _has_other_region(self, there: list[DeploymentState]) -> bool:
        """Whether every Lane of these Places has somebody fit elsewhere."""
        inside = {place.slot for place in there}
        lanes = (lane for place in there for lane in place.lanes)
        return all(any(other.fit > 0.0 for other in lane if other.slot not in inside) for lane in lanes)

    # --- looks ---

    def look(self, conversation: "RequestHandler", progress: int, now_s: float) -> None:
        """Once a second, of a stream: how long its first token took, and how far it came since the last look."""
        peer, place = conversation.peer, conversation.place
        if peer is None or place is None or conversation.resumption is not None or conversation.client.unread:
            return
        size = len(conversation.body)
        if not conversation.first_s:
            if conversation.attempts == 1:
                place.pulse.first_tokens.record_waiting(size, now_s - conversation.sent_s, now_s)
        elif not conversation.progress:
            ttft_s = conversation.first_s - conversation.sent_s
            place.pulse.first_tokens.record(size, ttft_s, now_s)
            peer.slowness_of(size.bit_length()).record(ttft_s)
            if now_s - conversation.first_s > LOOK_MIN_S:
                peer.slowness_of(0).record((now_s - conversation.first_s) / max(1, progress))
        else:
            peer.slowness_of(0).record(1.0 / max(1, progress - conversation.progress))

    def sweep(self, now_s: float, watch: bool) -> None:
        """Every 50 ms: what other workers took out, and whether anybody is left; once a second who is slow."""
        tables = self._hub.tables
        self._adopt(tables, now_s)
        if any(place.fit <= 0.0 for place in tables.places.values()):
            for lane in tables.lanes:
                if lane.places and all(place.fit <= 0.0 for place in lane.places):
                    self._panic(lane, now_s)
        if watch:
            for peer in tables.peers.values():
                if any([slowness.evaluate(peer.in_flight) for slowness in peer.slowness.values()]):
                    self._is_slow(peer)
            for place in tables.places.values():
                self._prove(place, now_s)

    def _is_slow(self, peer: EndpointState) -> None:
        """Slower than ever: out, where others can take its work. Everybody slow is busy, not broken."""
        lanes = [lane for place in self._hub.tables.places_of.get(peer, ()) for lane in place.lanes]
        if lanes and all(any(other.fit >= 1.0 for other in lane) for lane in lanes):
            self.saw(peer, Signal.SLOW)

    def _prove(self, place: DeploymentState, now_s: float) -> None:
        """An answer that ended well proves the credential."""
        board = self._hub.board
        at = (place.slot * board.workers + self._hub.config.index) * COUNTER_CELLS
        ended = board.deployment_counters[at + DeploymentCounter.ENDED]
        if ended != place.ended:
            place.ended, place.proven_s, place.refusals = ended, now_s, 0

    def _adopt(self, tables: RoutingTable, now_s: float) -> None:
        """Follow the other workers: whom one of them took out is out for this one too."""
        board, now_ms = self._hub.board, now_s * 1000
        for peer in tables.peers.values():
            told = board.ejected_until(peer.endpoint.slot)
            if told > peer.adopted and ejection_end_ms(told) > now_ms and peer.health.breaker is BreakerState.CLOSED:
                peer.adopted = told
                peer.health = health_from_ejection(told)
                tables.renew_fit(peer, now_s)
        for place in tables.places.values():
            told = board.retry_after_until(place.slot)
            if told > place.cools_told_ms:
                place.cools_told_ms, place.cools_until_s = told, told / 1000

    # --- nobody left ---

    def try_least_bad(self, lane: ModelRouteState, now_s: float, without: Collection[int] = ()) -> bool:
        """Everybody else is out: whether one request may try the least bad, which each is now and then. Row 19.

        Shape: `without` the Deployments of these slots.
        """
        places = [place for place in lane.places if place.slot not in without]
        peers = (peer for place in places for peer in place.peers if now_s - peer.panicked_s >= PANIC_EVERY_S)
        peer = least_bad(peers)
        if peer is None:
            return False
        peer.panicked_s = now_s
        self.saw(peer, Signal.EVERYBODY_OUT)
        return True

    def _panic(self, lane: ModelRouteState, now_s: float) -> None:
        if self.try_least_bad(lane, now_s):
            gateway = lane.site.gateway.name
            self.tell(lane.places[0], f"panic {gateway} {lane.model}", sentences.panic_sentence(gateway, lane.model))

    # --- Snapshots and Events ---

    def use(self, before: RoutingTable, tables: RoutingTable) -> None:
        """A new Snapshot: a Deployment that was changed is what it was not."""
        for slot, place in tables.places.items():
            known = before.places.get(slot)
            if known is None or known.deployment != place.deployment:
                place.cools_told_ms = self._hub.board.retry_after_until(slot)
            if known is not None and known.deployment.credential != place.deployment.credential:
                for peer in place.peers:
                    self.saw(peer, Signal.NEW_CREDENTIAL)

    def tell(self, place: DeploymentState, kind: str, sentence: str) -> None:
        """An Event, once in a while for each kind."""
        now_s, which = self._hub.clock(), (place.slot, kind)
        if now_s - self._told_s.get(which, float("-inf")) >= TELL_EVERY_S:
            self._told_s[which] = now_s
            self._hub.spool.add(EventRecord("Deployment", place.deployment.name, sentence))


def least_bad(peers: Iterable[EndpointState]) -> EndpointState | None:
    """Whom to try when all are out: one that can be reached before one that cannot, then who is back first."""
    out = [peer for peer in peers if peer.health.breaker in (BreakerState.OPEN, BreakerState.DOWN)]
    return min(out, key=lambda peer: (peer.health.breaker is BreakerState.DOWN, peer.health.open_until_s), default=None)
