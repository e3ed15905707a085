"""How a worker leaves: stopped with all the others, or retired because another has taken over its sockets.

Nothing that was accepted is refused or cut inside the grace. Answers say `connection: close` from the first moment, so
clients that keep connections come back on a new one, to another process; idle connections are closed last, because a
request may be on its way on them.
"""

import asyncio
from collections.abc import Callable

import msgspec

from fleetgate.ipc.shared_memory import WorkerCell
from fleetgate.proxy.downstream.client_connection import ClientConnection
from fleetgate.proxy.downstream.listener import Listener
from fleetgate.proxy.request.termination import SHUTTING_DOWN, terminate
from fleetgate.proxy.worker.services import SWEEP_S, Hub

HANDSHAKE_S = 0.5  # what was accepted may still be in its TLS handshake, which nobody lists


class DrainPolicy(msgspec.Struct, frozen=True):
    """How long a worker that leaves gives to whom.

    Units: `lb_grace_s` for load balancers to look away, while everything is accepted; `idle_s` for a request that may
    be on its way on a kept connection; `grace_s` for running answers after `lb_grace_s`.
    """

    lb_grace_s: float
    grace_s: float
    idle_s: float
    last: bool = True  # nobody accepts after this one, so what waits to be accepted is still taken


def stopping(lb_grace_s: float, grace_s: float) -> DrainPolicy:
    """Everything ends: who is idle need not be waited for long."""
    return DrainPolicy(lb_grace_s, grace_s, idle_s=0.2)


# Another worker accepts already, so nobody is in a hurry. 10 minutes is how long the official SDKs wait for an answer.
RETIRED = DrainPolicy(lb_grace_s=0.0, grace_s=600.0, idle_s=5.0, last=False)
AT_ONCE = DrainPolicy(lb_grace_s=0.0, grace_s=0.0, idle_s=0.0)


async def drain(hub: Hub, doors: list[Listener], order: Callable[[], DrainPolicy]) -> None:
    """Leave as ordered; a new order begins anew. Readiness falls first; returns when the process may end."""
    hub.board.set(hub.config.index, WorkerCell.ACCEPTING, 0)
    hub.draining = True
    leave, begun_s, closed_s = order(), hub.clock(), 0.0
    idle_since_s: dict[ClientConnection, float] = {}
    while True:
        now_s = hub.clock()
        if order() is not leave:
            leave, begun_s = order(), now_s
        if not closed_s and now_s - begun_s >= leave.lb_grace_s:
            closed_s = now_s
            for door in doors:
                await door.close(leave.last)
        if closed_s:
            _close_idle(hub, idle_since_s, now_s - leave.idle_s)
            handshakes = hub.config.tls_listen_fd >= 0 and now_s - closed_s < HANDSHAKE_S
            if now_s - begun_s >= leave.lb_grace_s + leave.grace_s or not (hub.connections or handshakes):
                break
        await asyncio.sleep(SWEEP_S)
    for client in hub.connections:
        if client.conversation is not None:
            terminate(client.conversation, SHUTTING_DOWN)
        client.transport.close()
    await asyncio.sleep(SWEEP_S)


def _close_idle(hub: Hub, idle_since_s: dict[ClientConnection, float], before_s: float) -> None:
    """Close who was found idle before a moment, and ever since: an answer in between would have closed it."""
    for client in hub.connections:
        if client.busy:
            idle_since_s.pop(client, None)
        elif idle_since_s.setdefault(client, hub.clock()) <= before_s:
            client.close_if_idle()
