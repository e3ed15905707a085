"""Requests that we end while their clients are there: their key was revoked, or the worker has to go."""

from fleetgate.core.exchange import ClientGone, Outcome, Refuse, State
from fleetgate.protocols.clients import openai
from fleetgate.protocols.error_codes import MESSAGES
from fleetgate.proxy.request import response_heads as answers
from fleetgate.proxy.request.handler import RequestHandler

REVOKED = Refuse(401, "invalid_api_key", should_retry=False)
SHUTTING_DOWN = Refuse(503, "shutting_down", retry_after_s=1.0, should_retry=True)


def terminate(conversation: RequestHandler, why: Refuse) -> None:
    """End it with an answer that says why, or as loudly as half an answer can be ended."""
    if conversation.exchange.state is State.ENDED:
        return
    conversation.client.keep_alive = False
    if not conversation.written:
        conversation.account(Outcome.REFUSED.value.encode())  # nobody is billed for it
        conversation.status, conversation.tail = why.status, answers.refusal(conversation, why)
        conversation.client_gone(ClientGone(Outcome.REFUSED))
        return
    if conversation.ask.stream:
        conversation.write_event(openai.error_event(why.code, MESSAGES[why.code]))
    elif conversation.request.raw:
        conversation.client.transport.abort()  # to HTTP/1.0 a regular close would be a good end
    conversation.client_gone()
