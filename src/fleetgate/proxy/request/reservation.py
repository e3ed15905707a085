"""One request's place with the token work it stands for: made at its pick, told its first token, closed at its end."""

from typing import TYPE_CHECKING

from fleetgate.core.admission.request_queue import PRIORITIES, Priority
from fleetgate.core.capacity.latency_model import RequestShape
from fleetgate.core.routing.prefix_affinity import BLOCK_TOKENS, COLD
from fleetgate.core.routing.scheduler import Placement, ScheduleRequest
from fleetgate.ipc.shared_memory import DeploymentCounter
from fleetgate.protocols.clients.openai import output_tokens_max
from fleetgate.protocols.prompt_prefix import chain_of

if TYPE_CHECKING:
    from fleetgate.proxy.request.handler import RequestHandler
    from fleetgate.proxy.worker.services import Hub

# An answer that is not streamed shows no first token: its prompt counts as through after so many times its forecast.
UNSEEN_FIRST = 1.5
_ENDED, _TTFT_LATE, _TPOT_LATE = (
    int(DeploymentCounter.ENDED),
    int(DeploymentCounter.TTFT_LATE),
    int(DeploymentCounter.TPOT_LATE),
)


class PlacementRequest:
    """What a request wants a place for, worked out once, however often it has to look."""

    __slots__ = ("_allowed", "_preferred", "chain", "need", "priority")

    def __init__(self, conversation: "RequestHandler") -> None:
        hub, lane, request = conversation.hub, conversation.lane, conversation.request
        model, body = lane.model, conversation.body
        # With a single Endpoint there is nobody to prefer.
        self.chain = chain_of(body, request.session) if lane.has_choice else ()
        warm = lane.affinity.find(self.chain) if self.chain else COLD
        self.need = RequestShape(
            prompt_tokens=hub.lengths.prompt_tokens(model, len(body)),
            output_tokens=hub.lengths.output_tokens(model, request.key.name, output_tokens_max(body)),
            warm_slot=warm.endpoint_slot,
            warm_tokens=warm.blocks * BLOCK_TOKENS,
        )
        judgement = conversation.judgement
        self.priority = PRIORITIES[judgement.priority] if judgement.priority else Priority.STANDARD
        self._allowed, self._preferred = judgement.allowed, judgement.preferred

    def wish(self, waited_s: float) -> ScheduleRequest:
        """The wish for a place now."""
        return ScheduleRequest(self.need, waited_s, self.priority, self._allowed, self._preferred)


class Reservation:
    """A place that was found, as long as the request holds it. Cost: 3 µs over its life."""

    __slots__ = ("_first_s", "_hold", "_hub", "_placed", "_promised", "_seen_tokens", "_sent_s")

    def __init__(self, hub: "Hub", placed: Placement, promised: bool, now_s: float) -> None:
        self._hub = hub
        self._promised = promised  # without an SLO nothing can be late
        self._placed = placed
        self._hold = placed.reservation
        self._sent_s = now_s
        self._first_s = 0.0
        self._seen_tokens = 0

    @property
    def endpoint_slot(self) -> int:
        """The Endpoint that was chosen."""
        return self._hold.endpoint_slot

    @property
    def predicted_s(self) -> float | None:
        """The TTFT that was predicted of it, None where no Profile does."""
        fit = self._placed.prediction
        return fit.ttft_s if fit is not None else None

    def moved(self, endpoint_slot: int) -> None:
        """Another Endpoint of the same Deployment takes it: the chosen one has just fallen out."""
        if endpoint_slot != self._hold.endpoint_slot:
            self._hold = self._hub.books.move(self._hold, endpoint_slot)

    def first_token(self, ttft_s: float, now_s: float) -> None:
        """The first token of a stream came. Units: `ttft_s` counts from the request's arrival here."""
        self._first_s = now_s
        self._hold = self._hub.books.first_token(self._hold, now_s)
        fit, observed_s = self._placed.prediction, now_s - self._sent_s
        if fit is not None:
            self._hub.learning.saw_first(self._hold.slot, fit, observed_s)
            self._hub.ttft_error.observe(abs(observed_s - fit.ttft_s))
            if self._promised and ttft_s > self._placed.target_s:
                self._hub.tally(self._hold.slot, _TTFT_LATE)

    def went_on(self, now_s: float) -> None:
        """An answer that broke off elsewhere goes on here: its prompt is through, and nothing is learned from it."""
        self._hold = self._hub.books.first_token(self._hold, now_s)

    def watch(self, tokens: int, furthest: dict[int, int], now_s: float) -> None:
        """Once a second. Units: `tokens` that its stream has brought by now, -1 before the first.

        Nothing shows the first token of an answer that is not streamed: it is presumed when it is overdue.
        """
        if tokens >= 0:
            if self._seen_tokens:
                at = self._hold.endpoint_slot
                furthest[at] = max(furthest.get(at, 0), tokens - self._seen_tokens)
            self._seen_tokens = tokens
            return
        fit = self._placed.prediction
        if fit is not None and self._hold.pending_tokens and now_s - self._sent_s > UNSEEN_FIRST * fit.ttft_s:
            self._hold = self._hub.books.first_token(self._hold, now_s)

    def ended(self, output_tokens: int, tpot_max_s: float, now_s: float) -> None:
        """The answer ended as it should. Units: `output_tokens` 0 where they are not known or were not streamed."""
        self._hub.tally(self._hold.slot, _ENDED)
        if (
            self._promised
            and output_tokens > 1
            and self._first_s
            and (now_s - self._first_s) / (output_tokens - 1) > tpot_max_s
        ):
            self._hub.tally(self._hold.slot, _TPOT_LATE)

    def measured(self, prompt_tokens: float, output_tokens: float, now_s: float) -> None:
        """How much was done while the place was held; where a Profile is known, its streams tell more."""
        if self._placed.prediction is None:
            units = RequestShape(prompt_tokens, output_tokens).units
            self._hub.learning.saw_end(self._hold.slot, units, now_s - self._sent_s)

    def settle(self) -> None:
        """Give the place and its token work back."""
        self._hub.books.settle(self._hold)
