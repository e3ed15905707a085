"""How a worker leaves: stopped with all others, or retired because another has taken over its sockets.

Nothing that was accepted is refused or cut inside the grace. Answers say `connection: close` from the first moment, so
clients that keep connections come back on a new one, to another process. Idle connections are closed last, because a
request may be on its way on them.
"""

import asyncio
from collections.abc import Callable

import msgspec

from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell
from fleetgate.proxy.downstream.connection_limits import ConnectionLimits, LimitedConnection
from fleetgate.proxy.downstream.listener import Listener
from fleetgate.proxy.request.handler import SHUTTING_DOWN
from fleetgate.proxy.request.response.heads import ResponseDefaults

CHECK_S = 0.05
HANDSHAKE_S = 0.5  # what was accepted may still be in its TLS handshake, where no connection object exists yet


class DrainPolicy(msgspec.Struct, frozen=True):
    """How long a worker that leaves waits.

    Units: `lb_grace_s` for load balancers to look away, while everything is accepted; `idle_s` for a request that may
    be on its way on a kept connection; `grace_s` for running answers after `lb_grace_s`.
    """

    lb_grace_s: float
    grace_s: float
    idle_s: float
    last: bool = True  # no other process accepts after this one, so what waits to be accepted is still taken


def stopping(lb_grace_s: float, grace_s: float) -> DrainPolicy:
    """Everything ends: idle connections need not be waited for long."""
    return DrainPolicy(lb_grace_s, grace_s, idle_s=0.2)


# Another worker accepts already, so there is no hurry. The official SDKs wait 10 minutes for an answer.
RETIRED = DrainPolicy(lb_grace_s=0.0, grace_s=600.0, idle_s=5.0, last=False)
AT_ONCE = DrainPolicy(lb_grace_s=0.0, grace_s=0.0, idle_s=0.0)


class Drain:
    """One worker's way out."""

    def __init__(
        self,
        shared: SharedMemory,
        worker: int,
        limits: ConnectionLimits,
        defaults: ResponseDefaults,
        clock: Callable[[], float],
    ) -> None:
        self._shared = shared
        self._worker = worker
        self._limits = limits
        self._defaults = defaults
        self._clock = clock

    async def run(self, listeners: list[Listener], policy: Callable[[], DrainPolicy], has_tls: bool) -> None:
        """Leave as `policy` says; another policy begins anew. Readiness falls first; returns when the process may end.

        Shape: with `has_tls`, handshakes may be under way.
        """
        self._shared.set(self._worker, WorkerCell.ACCEPTING, 0)
        self._defaults.begin_drain()
        leave, begun_s, closed_s = policy(), self._clock(), 0.0
        idle_since_s: dict[LimitedConnection, float] = {}
        while True:
            now_s = self._clock()
            if policy() is not leave:
                leave, begun_s = policy(), now_s
            if not closed_s and now_s - begun_s >= leave.lb_grace_s:
                closed_s = now_s
                for listener in listeners:
                    await listener.close(leave.last)
            if closed_s:
                self._close_idle(idle_since_s, now_s - leave.idle_s)
                handshakes = has_tls and now_s - closed_s < HANDSHAKE_S
                is_over = now_s - begun_s >= leave.lb_grace_s + leave.grace_s
                if is_over or not (self._limits.count or handshakes):
                    break
            await asyncio.sleep(CHECK_S)
        for connection in self._limits.connections:
            if connection.request is not None:
                connection.request.terminate(SHUTTING_DOWN)
            connection.close()
        await asyncio.sleep(CHECK_S)

    def _close_idle(self, idle_since_s: dict[LimitedConnection, float], before_s: float) -> None:
        """Close connections that have been idle since before a moment: an answer in between would have closed them."""
        for connection in self._limits.connections:
            if connection.is_busy:
                idle_since_s.pop(connection, None)
            elif idle_since_s.setdefault(connection, self._clock()) <= before_s:
                connection.close_if_idle()
