"""Resumes an interrupted response at another Deployment: whether, where and how."""

from collections.abc import Iterator

from fleetgate.protocols.clients.base import ClientProtocol
from fleetgate.protocols.messages import Operation, ResumeMethod
from fleetgate.protocols.resume.transcript import Transcript
from fleetgate.proxy.request.request_context import ReceivedRequest
from fleetgate.proxy.routing.deployment_state import DeploymentState
from fleetgate.proxy.routing.endpoint_state import EndpointState
from fleetgate.proxy.routing.model_route import ModelRouteState
from fleetgate.proxy.transport.interface import ResumedStream, UpstreamResponse

UNVERIFIED_IDS = 1  # the mark of token ids without a known engine that accepts them: a replay still compares them


def transcript_for(received: ReceivedRequest, route: ModelRouteState, deployment: DeploymentState) -> Transcript | None:
    """An empty transcript for a stream; None, at no cost, if the stream cannot be resumed anyway."""
    protocol, operation = received.context.protocol, received.operation
    if not route.resumes:
        return None
    methods = protocol.resume_methods(received.body, operation) & route.resume_methods
    mark = 0
    if ResumeMethod.TOKENS in methods:
        mark = _mark(deployment, received.info.model) or UNVERIFIED_IDS
    if mark > UNVERIFIED_IDS or methods - {ResumeMethod.TOKENS}:
        return protocol.new_transcript(operation, mark)
    return None


def _mark(deployment: DeploymentState, model: str) -> int:
    """The mark of a Deployment's token ids for a model; only its first model was probed."""
    names = deployment.upstream_names
    return deployment.token_mark if names.get(model) == next(iter(names.values()), None) else 0


class Resume:
    """The resumption of one response, perhaps several times. Units: `lost_s` is when it last broke off."""

    __slots__ = ("_asked_model", "_events_seen", "_protocol", "_transcript", "lost_s", "method")

    def __init__(
        self, protocol: ClientProtocol, transcript: Transcript, method: ResumeMethod, events_seen: int, asked_model: str
    ) -> None:
        self._protocol = protocol
        self._transcript = transcript
        self._asked_model = asked_model
        self._events_seen = events_seen
        self.method = method
        self.lost_s = 0.0

    @classmethod
    def of(
        cls,
        received: ReceivedRequest,
        response: UpstreamResponse,
        route: ModelRouteState,
        failed: tuple[EndpointState, ...],
        now_s: float,
    ) -> "Resume | None":
        """The method: replay and compare if the response is deterministic, else continue it; None if neither is safe.

        Shape: `failed` are the Endpoints that have failed this request.
        """
        transcript = response.transcript
        if transcript is None:
            return None
        protocol, body = received.context.protocol, received.body
        methods = protocol.resume_methods(body, received.operation)
        runs = transcript.runs  # decodes the last events, which shows whether the transcript is complete
        if not transcript.whole or not runs:
            return None
        for method in (ResumeMethod.REPLAY, ResumeMethod.TOKENS, ResumeMethod.PREFILL):
            if method not in methods or protocol.resume_body(method, body, transcript, "") is None:
                continue
            resume = cls(protocol, transcript, method, response.event_count, received.info.model)
            if method is not ResumeMethod.TOKENS or resume._has_candidate(route, failed, now_s):
                return resume
        return None

    def _has_candidate(self, route: ModelRouteState, failed: tuple[EndpointState, ...], now_s: float) -> bool:
        """Whether a healthy Deployment could resume it."""
        unfit = frozenset(self.unfit_slots(route))
        return any(
            deployment.choose_endpoint(now_s, failed) is not None
            for deployment in route.deployments
            if deployment.slot not in unfit
        )

    def broke_off(self, event_count: int, now_s: float) -> None:
        """Record that the response broke off after so many content events."""
        self.lost_s = now_s
        self._events_seen = max(self._events_seen, event_count)

    def is_possible(self, body: bytes) -> bool:
        """Whether the transcript so far can be resumed."""
        return self._protocol.resume_body(self.method, body, self._transcript, "") is not None

    def path(self, asked: bytes) -> bytes:
        """The path of the next engine's request."""
        return self._protocol.resume_path(self.method, asked)

    def unfit_slots(self, route: ModelRouteState) -> Iterator[int]:
        """The Deployments that cannot resume it."""
        if self.method is ResumeMethod.PREFILL:
            for deployment in route.deployments:
                if not deployment.resumes_prefill:
                    yield deployment.slot
        elif self.method is ResumeMethod.TOKENS:
            for deployment in route.deployments:
                if _mark(deployment, self._asked_model) != self._transcript.token_mark:
                    yield deployment.slot

    def body(self, body: bytes, engine: str) -> bytes:
        """The body for this engine."""
        resuming = self._protocol.resume_body(self.method, body, self._transcript, engine)
        assert resuming is not None, "`is_possible` was asked, and nothing has changed since"
        return resuming

    def answer(self, operation: Operation) -> ResumedStream:
        """Joins the next engine's response to the part that the client has read."""
        splicer = self._protocol.new_splicer(self._transcript, self.method, self._asked_model, operation)
        inherited = 0 if self.method is ResumeMethod.REPLAY else self._events_seen
        return ResumedStream(splicer, self._transcript, self._events_seen, inherited)
