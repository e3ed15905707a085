"""An answer that broke off half-way: whether and how it goes on from another Deployment."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fleetgate.protocols.clients.openai_resume import resume_methods
from fleetgate.protocols.messages import Operation, ResumeMethod
from fleetgate.protocols.resume.prefill import prefill_body
from fleetgate.protocols.resume.responses import ResponseSplicer, ResponseTranscript, response_resume_methods
from fleetgate.protocols.resume.splice import StreamSplicer
from fleetgate.protocols.resume.token_ids import COMPLETIONS, TokenSplicer, tokens_body
from fleetgate.protocols.resume.transcript import Transcript
from fleetgate.proxy.transport.response_relay import AttemptListener, ModelNames, ResponseRelay
from fleetgate.proxy.transport.resume_relay import ResumeRelay

if TYPE_CHECKING:
    from fleetgate.proxy.request.handler import RequestHandler
    from fleetgate.proxy.routing.routing_table import DeploymentState, ModelRouteState, RoutingTable


NOBODYS_IDS = 1  # the mark of ids that no other engine is known to take: a replay still compares them


def transcript_of(conversation: "RequestHandler") -> Transcript | None:
    """What to write a stream down in, None where it could not go on anyway: it then costs nothing."""
    lane, operation = conversation.lane, conversation.request.operation
    if operation is None or not lane.resumes:
        return None
    ways = _ways(conversation.body, operation) & lane.ways
    if operation.name == "responses":
        return ResponseTranscript() if ways else None
    place = conversation.place
    mark = 0
    if ResumeMethod.TOKENS in ways and place is not None:
        mark = _mark(place, conversation.ask.model) or NOBODYS_IDS
    return Transcript(mark) if mark > NOBODYS_IDS or ways - {ResumeMethod.TOKENS} else None


def _ways(body: bytes, operation: Operation) -> frozenset[ResumeMethod]:
    return response_resume_methods(body) if operation.name == "responses" else resume_methods(body, operation)


def _mark(place: "DeploymentState", model: str) -> int:
    """Whose token ids it gives and takes for this model; the probe asked for the first of its models only."""
    names = place.upstream_names
    return place.token_mark if names.get(model) == next(iter(names.values()), None) else 0


class Resume:
    """One answer that goes on elsewhere, perhaps twice. Units: `lost_s` is when it last broke off."""

    __slots__ = ("_asked_model", "_seen", "_transcript", "lost_s", "way")

    def __init__(self, transcript: Transcript, way: ResumeMethod, relay: ResponseRelay, asked_model: str) -> None:
        self._transcript = transcript
        self._asked_model = asked_model
        self._seen = relay.event_count
        self.way = way
        self.lost_s = 0.0

    @classmethod
    def of(cls, conversation: "RequestHandler", relay: ResponseRelay, now_s: float) -> "Resume | None":
        """How this answer goes on: compared where that is exact, else asked to be gone on with; None if not at all."""
        transcript, operation = relay.script, conversation.request.operation
        if transcript is None or operation is None:
            return None
        ways = _ways(conversation.body, operation)
        runs = transcript.runs  # reads the last events, which tell whether all of it is known
        if not transcript.whole or not runs:
            return None
        if ResumeMethod.REPLAY in ways:
            return cls(transcript, ResumeMethod.REPLAY, relay, conversation.ask.model)
        if ResumeMethod.TOKENS in ways and tokens_body(conversation.body, transcript) is not None:
            made = cls(transcript, ResumeMethod.TOKENS, relay, conversation.ask.model)
            if made.has_taker(conversation):
                return made
        if ResumeMethod.PREFILL in ways and prefill_body(conversation.body, transcript, "") is not None:
            return cls(transcript, ResumeMethod.PREFILL, relay, conversation.ask.model)
        return None

    def has_taker(self, conversation: "RequestHandler") -> bool:
        """Whether some Deployment that is up could go on with it."""
        lane, tables = conversation.lane, conversation.hub.tables
        unfit = frozenset(self.unfit(lane, tables))
        lost = () if conversation.peer is None else (conversation.peer,)
        without, now_s = (*conversation.failed_peers, *lost), conversation.hub.clock()
        slots = [candidate.slot for candidate in lane.candidates if candidate.slot not in unfit]
        return any(tables.places[slot].choose(now_s, without) is not None for slot in slots)

    def broke_off(self, relay: ResponseRelay | None, now_s: float) -> None:
        """It did, with so much said by then."""
        self.lost_s = now_s
        if relay is not None:
            self._seen = max(self._seen, relay.event_count)

    def can_go_on(self, body: bytes) -> bool:
        """Whether what was said by now can be gone on with."""
        return self.way is ResumeMethod.REPLAY or self._body(body, "") is not None

    def path(self, asked: bytes) -> bytes:
        """Where the next engine is asked."""
        return COMPLETIONS if self.way is ResumeMethod.TOKENS else asked

    def unfit(self, lane: "ModelRouteState", tables: "RoutingTable") -> Iterator[int]:
        """The Deployments that could not go on with it."""
        if self.way is ResumeMethod.PREFILL:
            for candidate in lane.candidates:
                if not tables.places[candidate.slot].prefills:
                    yield candidate.slot
        elif self.way is ResumeMethod.TOKENS:
            for candidate in lane.candidates:
                if _mark(tables.places[candidate.slot], self._asked_model) != self._transcript.token_mark:
                    yield candidate.slot

    def body(self, body: bytes, engine: str) -> bytes:
        """What this engine is asked."""
        if self.way is ResumeMethod.REPLAY:
            return body
        going_on = self._body(body, engine)
        assert going_on is not None, "asked for, and not changed since"
        return going_on

    def _body(self, body: bytes, engine: str) -> bytes | None:
        if self.way is ResumeMethod.TOKENS:
            return tokens_body(body, self._transcript)
        return prefill_body(body, self._transcript, engine)

    def relay(self, owner: AttemptListener, operation: Operation, hide_usage: bool, names: ModelNames) -> ResumeRelay:
        """Who reads its answer."""
        seam: StreamSplicer
        if isinstance(self._transcript, ResponseTranscript):
            seam = ResponseSplicer(self._transcript, self._asked_model)
        elif self.way is ResumeMethod.TOKENS:
            seam = TokenSplicer(self._transcript, self._asked_model, operation)
        else:
            seam = StreamSplicer(self._transcript, self.way, self._asked_model)
        relay = ResumeRelay(owner, operation, hide_usage, names, seam, self._transcript)
        relay.event_count = self._seen
        relay.inherited = 0 if self.way is ResumeMethod.REPLAY else self._seen
        return relay
