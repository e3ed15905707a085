"""Poison requests: a request that ends the engine that serves it must not move from engine to engine."""

from typing import NamedTuple

DEATHS_MAX = 2  # one engine may die of any cause; two engines dead under one request are that request's effect
TOGETHER_S = 0.2  # attempts lost at one Endpoint within this time have one cause


class LostAttempt(NamedTuple):
    """How an attempt was lost.

    Units: `last_loss_age_s` since another waiting request was lost at the same Endpoint.
    Shape: `reset` is a connection that ended without a response after the whole request was sent; `others_waiting` are
    other requests there without content yet; `served` says whether the Endpoint answered, or was answering, others.
    """

    reset: bool
    others_waiting: int
    served: bool
    last_loss_age_s: float


def is_suspicious(loss: LostAttempt) -> bool:
    """Whether the request may be the cause: it was the newest there, and the only one without any response data.

    A refusal, a timeout, an error status and a loss of several waiting requests at once do not point at this request.
    """
    return loss.reset and loss.served and not loss.others_waiting and loss.last_loss_age_s > TOGETHER_S


def is_poison(deaths: int) -> bool:
    """Whether a request must not be sent again.

    Shape: `deaths` counts the Endpoints that it was lost at suspiciously and that could then not be reached.
    """
    return deaths >= DEATHS_MAX
