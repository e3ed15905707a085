"""A request that ends the engines that serve it must not be carried from one to the next until none is left."""

from typing import NamedTuple

DEATHS_MAX = 2  # one engine may die of anything; two of one request are its doing
TOGETHER_S = 0.2  # what is lost so close together at one Endpoint is lost for one reason


class LostAttempt(NamedTuple):
    """How an attempt was lost. Units: `since_other_s` since another waiting request was lost at the same Endpoint.

    Shape: `reset` is a connection that ended without an answer after the whole request was sent; `others_waiting` are
    other requests there that had no content yet; `served` whether the Endpoint had answered, or was answering, others.
    """

    reset: bool
    others_waiting: int
    served: bool
    last_loss_age_s: float


def is_suspicious(loss: LostAttempt) -> bool:
    """Whether the request may be why: it was the newest there, and the only one that nothing had come back of yet.

    A refusal, a timeout, an error status and a loss that hits several waiting requests say nothing of this one.
    """
    return loss.reset and loss.served and not loss.others_waiting and loss.last_loss_age_s > TOGETHER_S


def is_poison(died: int) -> bool:
    """Shape: `died` counts the Endpoints that were lost with it suspiciously and could then not be reached."""
    return died >= DEATHS_MAX
