"""Limits of connections per worker, address and key, and of the memory for request bodies."""

import ipaddress
from functools import lru_cache
from typing import Protocol

from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell
from fleetgate.protocols import error_codes as errors
from fleetgate.protocols import http1
from fleetgate.proxy.downstream.listener import Listener
from fleetgate.proxy.downstream.local_responses import RequestRejected
from fleetgate.proxy.overload.notices import OperatorNotices
from fleetgate.proxy.overload.overload_manager import SURPLUS, TIGHT, OverloadState
from fleetgate.proxy.request.response.in_flight import InFlightRequest

IP_CONNECTIONS_MAX = 512  # per public address and worker; not small: proxies and offices share addresses
BODY_SHARE = 0.25  # of the memory there is, over all workers
BODY_BUDGET_BYTES_MIN = http1.BODY_BYTES_MAX + 4 * 1024 * 1024  # room for the largest body
LINGERING_MAX = 64  # refused connections that get an error response at a time; others are only closed
_RETRY = b"retry-after: 1\r\nretry-after-ms: 1000\r\nx-should-retry: true\r\n"


class LimitedConnection(Protocol):
    """A client connection, as limits use it."""

    @property
    def client_address(self) -> str:
        """The client's address, without its port."""

    def abort(self) -> None:
        """Close at once."""

    def close_if_idle(self) -> None:
        """Close if no request is under way."""

    @property
    def may_be_closed(self) -> bool:
        """Whether it has served a request and waits for the next one."""

    @property
    def is_busy(self) -> bool:
        """Whether a request or a response is under way."""

    @property
    def request(self) -> InFlightRequest | None:
        """The request in flight."""

    def tick(self, now_s: float) -> None:
        """Once a second: check its deadline."""

    def close(self) -> None:
        """Close after all written data was sent."""


class BodyBudget:
    """The memory budget for bodies that do not come in one read."""

    def __init__(self, budget_bytes: int, notices: OperatorNotices) -> None:
        self.budget_bytes = budget_bytes
        self._notices = notices
        self._held_bytes = 0

    def hold(self, more_bytes: int) -> bool:
        """Take bytes; False if the budget is used up."""
        if self._held_bytes + more_bytes > self.budget_bytes:
            self._notices.emit(
                "bodies", f"request bodies hold their limit of {self.budget_bytes >> 20} MiB; more get 503"
            )
            return False
        self._held_bytes += more_bytes
        return True

    def release(self, held_bytes: int) -> None:
        """Return bytes."""
        self._held_bytes -= held_bytes

    @property
    def is_tight(self) -> bool:
        """Whether the budget is nearly used up."""
        return self._held_bytes > self.budget_bytes * TIGHT


class ConnectionLimits:
    """The client connections of one worker.

    Shape: `ip_max` and `key_max` 0 for no limit, `ip_max` -1 for 512 of a public address.
    """

    def __init__(
        self, shared: SharedMemory, worker: int, connections_max: int, ip_max: int, key_max: int, bodies: BodyBudget
    ) -> None:
        self._shared = shared
        self._worker = worker
        self._connections_max = connections_max
        self._ip_max = ip_max
        self._key_max = key_max
        self.bodies = bodies
        self.shed_share = 0.0
        self._shed_sum = 0.0
        self._refused = 0
        self._open: dict[LimitedConnection, None] = {}
        self._by_address: dict[str, int] = {}
        self._by_key: dict[str, int] = {}
        self._address_of: dict[LimitedConnection, str] = {}
        self._key_of: dict[LimitedConnection, str] = {}
        self._listeners: list[Listener] = []

    def pause_when_full(self, listener: Listener) -> Listener:
        """Stop accepting on this listener while there are too many connections."""
        self._listeners.append(listener)
        return listener

    @property
    def connections(self) -> list[LimitedConnection]:
        """The open connections."""
        return list(self._open)

    @property
    def count(self) -> int:
        """The number of open connections."""
        return len(self._open)

    def connected(self, client: LimitedConnection) -> RequestRejected | None:
        """Count a new connection. Returns the refusal if there are too many."""
        self._open[client] = None
        count = len(self._open)
        self._shared.set(self._worker, WorkerCell.CONNECTIONS, count)
        if count >= self._connections_max * SURPLUS:
            if count >= self._connections_max:
                for listener in self._listeners:
                    listener.pause()
            return self._refuse(client, self.overloaded())
        if not self._ip_max:
            return None
        address = self._address_of[client] = _network_of(client.client_address)
        count = self._by_address[address] = self._by_address.get(address, 0) + 1
        limit = self._ip_max if self._ip_max > 0 else IP_CONNECTIONS_MAX
        if count <= limit or (self._ip_max < 0 and not _is_public(address)):
            return None
        return self._refuse(client, RequestRejected(*errors.TOO_MANY_CONNECTIONS_OF_ADDRESS.filled(), extra=_RETRY))

    def _refuse(self, client: LimitedConnection, rejected: RequestRejected) -> RequestRejected:
        self._refused += 1
        if self._refused > LINGERING_MAX:
            client.abort()
        return rejected

    def disconnected(self, client: LimitedConnection) -> None:
        """Uncount a connection."""
        self._open.pop(client, None)
        self._shared.set(self._worker, WorkerCell.CONNECTIONS, len(self._open))
        _count_down(self._by_address, self._address_of.pop(client, ""))
        _count_down(self._by_key, self._key_of.pop(client, ""))

    def admits_key(self, client: LimitedConnection, key: str) -> bool:
        """Count a connection as one of a key; False if the key has too many. Called for heads not seen before."""
        if not self._key_max or self._key_of.get(client) == key:
            return True
        _count_down(self._by_key, self._key_of.pop(client, ""))
        if self._by_key.get(key, 0) >= self._key_max:
            return False
        self._by_key[key] = self._by_key.get(key, 0) + 1
        self._key_of[client] = key
        return True

    def sheds(self) -> bool:
        """Whether to refuse this new request. Called only while `shed_share` is not 0."""
        self._shed_sum += self.shed_share
        if self._shed_sum < 1.0:
            return False
        self._shed_sum -= 1.0
        return True

    def overloaded(self) -> RequestRejected:
        """The refusal for shed requests."""
        return RequestRejected(*errors.OVERLOADED.filled(), extra=_RETRY)

    def apply(self, state: OverloadState) -> None:
        """Follow the overload manager. Four times a second."""
        self._refused = 0
        self.shed_share = state.shed_share
        if state.closes_idle:
            for client in list(self._open):
                if client.may_be_closed:
                    client.close_if_idle()
        for listener in self._listeners:
            if state.accepts is False:
                listener.pause()
            elif state.accepts:
                listener.resume()


def _count_down(counts: dict[str, int], name: str) -> None:
    left = counts.get(name, 0) - 1
    if left > 0:
        counts[name] = left
    else:
        counts.pop(name, None)


def _network_of(text: str) -> str:
    """The part of an address that is counted: for IPv6 the network of one customer."""
    if ":" not in text:
        return text
    address = ipaddress.IPv6Address(text.partition("%")[0])
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)).network_address)


@lru_cache(1024)
def _is_public(address: str) -> bool:
    """Whether an address is public. Private and loopback ones are load balancers with many clients."""
    return bool(address) and ipaddress.ip_address(address).is_global
