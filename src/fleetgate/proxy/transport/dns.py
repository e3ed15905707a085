"""The addresses of an Endpoint's name: asked for again every few seconds, the last good ones kept whatever comes."""

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable

RESOLVE_EVERY_S = 5.0  # FAULTS.md row 66
RESOLVE_S_MAX = 30.0  # a name server that takes longer is away; nobody waits for it but the first request
_BROKEN = (OSError, TimeoutError, UnicodeError)

Resolve = Callable[[str, int], Awaitable[list[str]]]


class AddressRefused(Exception):
    """An address is outside the ranges that Endpoints may be dialled in."""


async def resolve(host: str, port: int) -> list[str]:
    """The system's own resolver, in a thread.

    Raises: `OSError`.
    """
    infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=1)
    return list(dict.fromkeys(str(info[4][0]) for info in infos))


class Addresses:
    """What a name resolves to now. Every set is checked by `check` before it is used; a bad one changes nothing.

    Shape: `check` raises `AddressRefused`. Cost: nothing for requests; one question every 5 s for each name in use.
    """

    def __init__(self, host: str, port: int, check: Callable[[str, list[str]], None]) -> None:
        self._host = host
        self._port = port
        self._check = check
        self._asking: asyncio.Task[list[str]] | None = None
        self._asked_s = float("-inf")
        self._fixed = _is_literal(host)
        self.resolve: Resolve = resolve
        self.current: list[str] = []
        self.trouble = ""  # why the last question brought nothing new

    async def get(self, now_s: float, timeout_s: float) -> list[str]:
        """The last good set at once, whatever its age; only the first request has to wait for one.

        Raises: `OSError`, `TimeoutError` and `AddressRefused` while there is none.
        """
        if self.current:
            self.refresh(now_s)
            return self.current
        async with asyncio.timeout(timeout_s):
            return await asyncio.shield(self._ask(now_s))

    def refresh(self, now_s: float, at_once: bool = False) -> None:
        """Ask again in the background when it is time; an address that failed is a reason not to wait."""
        due_s = self._asked_s + (RESOLVE_EVERY_S / 5 if at_once else RESOLVE_EVERY_S)
        if self.current and not self._fixed and now_s >= due_s:
            self._ask(now_s).add_done_callback(_look_at)

    def _ask(self, now_s: float) -> asyncio.Task[list[str]]:
        if self._asking is None or self._asking.done():
            self._asked_s = now_s
            self._asking = asyncio.get_running_loop().create_task(self._answer())
        return self._asking

    async def _answer(self) -> list[str]:
        try:
            async with asyncio.timeout(RESOLVE_S_MAX):
                addresses = await self.resolve(self._host, self._port)
            if not addresses:
                raise OSError(f"{self._host} has no address")
            self._check(self._host, addresses)
        except (*_BROKEN, AddressRefused) as error:
            self.trouble = str(error) or f"{self._host} was not resolved in {RESOLVE_S_MAX:.0f} s"
            if not self.current:
                raise
            return self.current
        self.current, self.trouble = addresses, ""
        return addresses


def _look_at(task: asyncio.Task[list[str]]) -> None:
    """A background question that failed is kept as `trouble`; asyncio need not complain of it too."""
    if not task.cancelled():
        task.exception()


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


class EgressRule:
    """The addresses that may be dialled: inside the ranges, or public ones over https; link-local ones never.

    Shape: `ranges` are CIDRs.
    """

    def __init__(self, ranges: tuple[str, ...], encrypted: bool) -> None:
        self._encrypted = encrypted
        self._networks = [ipaddress.ip_network(text) for text in ranges]

    def check(self, host: str, addresses: list[str]) -> None:
        """Refuse a host one of whose addresses is outside.

        Raises: `AddressRefused`.
        """
        for text in addresses:
            address = ipaddress.ip_address(text.partition("%")[0])
            if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
                address = address.ipv4_mapped
            inside = any(address in network for network in self._networks if network.version == address.version)
            if address.is_link_local or not (inside or (self._encrypted and address.is_global)):
                raise AddressRefused(f"{host} resolves to {text}, which --egress-allow does not include")
