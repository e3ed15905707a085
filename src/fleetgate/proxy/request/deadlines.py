"""What is looked at from outside while a conversation waits: silence, a second attempt that is due."""

from typing import TYPE_CHECKING

from fleetgate.core.exchange import State
from fleetgate.core.health import timeouts as patience
from fleetgate.protocols.clients.openai import output_tokens_max
from fleetgate.proxy.request.hedging import try_hedge
from fleetgate.proxy.request.reservation import Reservation
from fleetgate.proxy.request.response_writer import COMMENT_EVERY_S

if TYPE_CHECKING:
    from fleetgate.proxy.request.handler import RequestHandler

WHOLE_ANSWER_MAX_S = patience.WHOLE_MAX_S
SILENCE_S = 1.5  # between two looks that are a second apart: more than chance


def first_event_s(conversation: "RequestHandler", booking: Reservation | None) -> float:
    """How long an attempt may take to bring something."""
    if not conversation.ask.stream:
        return min(WHOLE_ANSWER_MAX_S, patience.WHOLE_MIN_S)  # then `has_more_time` reads how long it may become
    predicted_s = booking.predicted_s if booking is not None else None
    if conversation.place is not None:  # what was seen stands beside what is predicted: whichever is more patient
        seen_s = conversation.place.pulse.first_tokens.expected_s(len(conversation.body))
        predicted_s = max(predicted_s or 0.0, seen_s) if seen_s is not None else predicted_s
    return patience.first_event_s(predicted_s)


def has_more_time(conversation: "RequestHandler", now_s: float) -> bool:
    """Whether an answer that is not streamed may take longer than the least that each may; it then has that time."""
    place, booking = conversation.place, conversation.booking
    is_early = conversation.deadline_s > now_s  # its Endpoint was lost, which no more time would bring back
    if is_early or conversation.ask.stream or conversation.first_s or place is None:
        return False
    first_s = booking.predicted_s if booking is not None else None
    tokens_max = output_tokens_max(conversation.body)
    limit_s = min(WHOLE_ANSWER_MAX_S, patience.whole_answer_s(first_s, place.pulse.token_s, tokens_max))
    conversation.deadline_s = conversation.sent_s + limit_s
    return conversation.deadline_s > now_s


def stall_s(conversation: "RequestHandler") -> float:
    """How long the answer may be silent now."""
    place = conversation.place
    return place.pulse.stall_s if place is not None else patience.STALL_MAX_S


def perhaps_hedge(conversation: "RequestHandler", now_s: float) -> None:
    """At each sweep: is a second attempt due?"""
    exchange = conversation.exchange
    if conversation.hedge is None and exchange.state is State.TRYING and not exchange.resumes:
        conversation.hedge = try_hedge(conversation, now_s)


def watch(conversation: "RequestHandler", now_s: float, furthest: dict[int, int]) -> None:
    """Once a second: a committed answer that moved since the last look has its stall limit before it again.

    Shape: `furthest` collects, by Endpoint, the most tokens that one stream got since then.
    """
    relay, state = conversation.relay, conversation.exchange.state
    if relay is not None:
        if conversation.booking is not None:
            conversation.booking.watch(relay.event_count if conversation.first_s else -1, furthest, now_s)
        progress = relay.beats + relay.event_count + relay.body_bytes
        if relay.stream or conversation.ask.stream:
            conversation.hub.ward.look(conversation, progress, now_s)
        if conversation.first_s and progress != conversation.progress:
            conversation.progress = progress
            conversation.deadline_s = now_s + stall_s(conversation)
            if conversation.attempt:
                conversation.hub.accounts.progress(conversation, relay)
            if state is State.COMMITTED:
                _heard(conversation, now_s)
    if conversation.ask.stream and now_s - (conversation.heard_s or conversation.started_s) >= COMMENT_EVERY_S:
        conversation.keep_alive(now_s, state is State.TRYING)


def _heard(conversation: "RequestHandler", now_s: float) -> None:
    """Its client read something; a silence that ended by itself was no stall."""
    place = conversation.place
    silent_s = now_s - max(conversation.first_s, conversation.heard_s)
    if silent_s > SILENCE_S and place is not None and not conversation.client.unread:
        place.pulse.record_gap(silent_s)
    conversation.heard_s = now_s
