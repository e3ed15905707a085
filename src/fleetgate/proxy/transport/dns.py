"""The addresses of an Endpoint's name: resolved again every few seconds, the last good ones kept until better come."""

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable

from fleetgate.proxy.transport.network import peer_timeout

RESOLVE_EVERY_S = 5.0  # faults.md row 66
RESOLVE_S_MAX = 30.0  # a name server that takes longer is down; only the first request waits for it
_RESOLVE_ERRORS = (OSError, TimeoutError, UnicodeError)

Resolve = Callable[[str, int], Awaitable[list[str]]]


class AddressRefused(Exception):
    """An address is outside the ranges that the egress rule allows."""


async def resolve(host: str, port: int) -> list[str]:
    """Resolve with the system's resolver, in a thread.

    Raises: `OSError`.
    """
    infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=1)
    return list(dict.fromkeys(str(info[4][0]) for info in infos))


class Addresses:
    """The current addresses of a name. Each answer is checked with `check` before use; a refused one changes nothing.

    Shape: `check` raises `AddressRefused`.
    Cost: nothing for requests; one query every 5 s for each name in use.
    """

    def __init__(self, host: str, port: int, check: Callable[[str, list[str]], None]) -> None:
        self._host = host
        self._port = port
        self._check = check
        self._query: asyncio.Task[list[str]] | None = None
        self._queried_s = float("-inf")
        self._is_literal = _is_literal(host)
        self.resolve: Resolve = resolve
        self.current: list[str] = []
        self.error = ""  # of the last query, empty if it succeeded

    async def get(self, now_s: float, timeout_s: float) -> list[str]:
        """Return the last good addresses at once, whatever their age; only the first request waits for a query.

        Raises: `OSError`, `TimeoutError` and `AddressRefused` while there are none.
        """
        if self.current:
            self.refresh(now_s)
            return self.current
        async with peer_timeout(timeout_s):
            return await asyncio.shield(self._start_query(now_s))

    def refresh(self, now_s: float, at_once: bool = False) -> None:
        """Resolve again in the background if that is due: after 5 s, or `at_once` (an address failed) after 1 s."""
        due_s = self._queried_s + (RESOLVE_EVERY_S / 5 if at_once else RESOLVE_EVERY_S)
        if self.current and not self._is_literal and now_s >= due_s:
            self._start_query(now_s).add_done_callback(_retrieve_error)

    def _start_query(self, now_s: float) -> asyncio.Task[list[str]]:
        if self._query is None or self._query.done():
            self._queried_s = now_s
            self._query = asyncio.get_running_loop().create_task(self._resolve())
        return self._query

    async def _resolve(self) -> list[str]:
        try:
            async with peer_timeout(RESOLVE_S_MAX):
                addresses = await self.resolve(self._host, self._port)
            if not addresses:
                raise OSError(f"{self._host} has no address")
            self._check(self._host, addresses)
        except (*_RESOLVE_ERRORS, AddressRefused) as error:
            self.error = str(error) or f"{self._host} was not resolved in {RESOLVE_S_MAX:.0f} s"
            if not self.current:
                raise
            return self.current
        self.current, self.error = addresses, ""
        return addresses


def _retrieve_error(task: asyncio.Task[list[str]]) -> None:
    """Keep asyncio from logging a failed background query: its text is in `error`."""
    if not task.cancelled():
        task.exception()


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


class EgressRule:
    """The addresses that may be dialled: those in the ranges, and public ones over https, but no link-local ones.

    Shape: `ranges` are CIDRs.
    """

    def __init__(self, ranges: tuple[str, ...], encrypted: bool) -> None:
        self._encrypted = encrypted
        self._networks = [ipaddress.ip_network(text) for text in ranges]

    def check(self, host: str, addresses: list[str]) -> None:
        """Refuse a host if one of its addresses is outside the rule.

        Raises: `AddressRefused`.
        """
        for text in addresses:
            address = ipaddress.ip_address(text.partition("%")[0])
            if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
                address = address.ipv4_mapped
            inside = any(address in network for network in self._networks if network.version == address.version)
            if address.is_link_local or not (inside or (self._encrypted and address.is_global)):
                raise AddressRefused(f"{host} resolves to {text}, which --egress-allow does not include")
