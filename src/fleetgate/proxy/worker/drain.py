"""Drains a worker that stops with all others, or that retires because another has taken over its sockets.

Within the grace period no accepted request is refused or cut. Responses have `connection: close` from the start, so
clients make new connections, to another process. Idle connections are closed last, because a request may be on its
way on them.
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
HANDSHAKE_S = 0.5  # an accepted connection in its TLS handshake is no object yet


class DrainPolicy(msgspec.Struct, frozen=True):
    """The waits of a draining worker.

    Units: `lb_grace_s` until load balancers send no more, while everything is accepted; `idle_s` for a request that
    may be on its way on a kept connection; `grace_s` for responses in flight after `lb_grace_s`.
    """

    lb_grace_s: float
    grace_s: float
    idle_s: float
    last: bool = True  # no other process accepts after this one, so queued connections are accepted too


def stopping(lb_grace_s: float, grace_s: float) -> DrainPolicy:
    """All workers stop: wait only shortly for idle connections."""
    return DrainPolicy(lb_grace_s, grace_s, idle_s=0.2)


# Another worker accepts already. The official SDKs wait 10 minutes for a response.
RETIRED = DrainPolicy(lb_grace_s=0.0, grace_s=600.0, idle_s=5.0, last=False)
AT_ONCE = DrainPolicy(lb_grace_s=0.0, grace_s=0.0, idle_s=0.0)


class Drain:
    """The drain of one worker."""

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
        """Drain by `policy`; a changed policy restarts its waits. Readiness ends first. Returns when it may exit.

        Shape: with `has_tls`, handshakes may be under way.
        """
        self._shared.set(self._worker, WorkerCell.ACCEPTING, 0)
        self._defaults.begin_drain()
        leave, started_s, closed_s = policy(), self._clock(), 0.0
        idle_since_s: dict[LimitedConnection, float] = {}
        while True:
            now_s = self._clock()
            if policy() is not leave:
                leave, started_s = policy(), now_s
            if not closed_s and now_s - started_s >= leave.lb_grace_s:
                closed_s = now_s
                for listener in listeners:
                    await listener.close(leave.last)
            if closed_s:
                self._close_idle(idle_since_s, now_s - leave.idle_s)
                handshakes = has_tls and now_s - closed_s < HANDSHAKE_S
                is_over = now_s - started_s >= leave.lb_grace_s + leave.grace_s
                if is_over or not (self._limits.count or handshakes):
                    break
            await asyncio.sleep(CHECK_S)
        for connection in self._limits.connections:
            if connection.request is not None:
                connection.request.terminate(SHUTTING_DOWN)
            connection.close()
        await asyncio.sleep(CHECK_S)

    def _close_idle(self, idle_since_s: dict[LimitedConnection, float], before_s: float) -> None:
        """Close connections that have been idle since before a moment; later responses close theirs themselves."""
        for connection in self._limits.connections:
            if connection.is_busy:
                idle_since_s.pop(connection, None)
            elif idle_since_s.setdefault(connection, self._clock()) <= before_s:
                connection.close_if_idle()
