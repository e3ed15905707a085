"""Where Fleetgate may be told to connect: every address of a URL is looked at before the URL is kept.

The data plane checks again at each dial, so that a name that changes its address later gains nothing.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Iterable, Sequence

import msgspec
from pydantic_core import PydanticCustomError

from fleetgate.control.resources.field_types import Url, parse_url

IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
RESOLVE_S_MAX = 5.0  # the resolver's own first time-out; a name that takes longer cannot be checked

# Addresses where clouds serve a machine's own credentials, beside the link-local 169.254.0.0/16 and fe80::/10.
_METADATA = tuple(
    ipaddress.ip_network(text)
    for text in ("fd00:ec2::254/128", "100.100.100.200/32", "192.0.0.192/32", "168.63.129.16/32", "fd20:ce::254/128")
)
_METADATA_NAMES = frozenset({"metadata.google.internal", "metadata.goog", "metadata", "instance-data"})


class EgressDenied(msgspec.Struct, frozen=True):
    """Why an address is refused."""

    message: str
    fix: str


def parse_ranges(texts: Iterable[str]) -> tuple[IpNetwork, ...]:
    """CIDRs into networks. Raises: `ValueError` naming the one that is not a CIDR."""
    return tuple(ipaddress.ip_network(text.strip(), strict=False) for text in texts if text.strip())


def check_addresses(
    host: str, address: str, ranges: Sequence[IpNetwork], encrypted: bool = True
) -> EgressDenied | None:
    """Whether one address of a host given through the API is refused, and why.

    Public addresses over https need no leave; private ones, and plain http, only inside the ranges.
    """
    plain = _plain(address)
    if is_never_allowed(plain):
        return _never_denied(host, address)
    if plain.is_global and encrypted:
        return None
    if any(plain in network for network in ranges if network.version == plain.version):
        return None
    listed = ", ".join(map(str, ranges)) or "no range"
    what = "over plain http, " if plain.is_global else ""
    return EgressDenied(
        f"{host} is at {address}, {what}outside the ranges allowed for URLs given through the API ({listed})",
        f"start with --egress-allow {plain}/{plain.max_prefixlen}, or write the Deployment in the --config file",
    )


def is_never_allowed(address: IpAddress) -> bool:
    """Whether an address is refused whatever the ranges say: link-local, metadata, unspecified, multicast."""
    return (
        address.is_link_local
        or address.is_unspecified
        or address.is_multicast
        or any(address in network for network in _METADATA if network.version == address.version)
    )


def check_literal(url: str) -> EgressDenied | None:
    """Whether a URL names a refused address without any look-up: for what the machine's operator wrote."""
    try:
        host = parse_url(url).host
    except PydanticCustomError:
        return None  # the parser says what is wrong with it
    if host.rstrip(".").lower() in _METADATA_NAMES:
        return _never_denied(host, host)
    try:
        # The resolver's own reading of numbers, so that 0x7f.1 and 2130706433 are seen as it would dial them.
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return None
    for _, _, _, _, sockaddr in found:
        if is_never_allowed(_plain(str(sockaddr[0]))):
            return _never_denied(host, str(sockaddr[0]))
    return None


async def check_url(url: str, ranges: Sequence[IpNetwork]) -> EgressDenied | None:
    """Whether a URL given through the API is refused: each address its host resolves to must be allowed."""
    denied = check_literal(url)
    if denied is not None:
        return denied
    try:
        parts = parse_url(url)
    except PydanticCustomError:
        return None
    match await resolve_allowed(parts, ranges):
        case EgressDenied() as refused:
            return refused
        case _:
            return None


async def resolve_allowed(url: Url, ranges: Sequence[IpNetwork] | None) -> list[str] | EgressDenied:
    """The addresses at which a URL's host may be dialled, each judged; without ranges only the forbidden ones are.

    Who dials these, and not the name again, cannot be led elsewhere by a name that changes its address.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(RESOLVE_S_MAX):
            found = await loop.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, TimeoutError):
        return EgressDenied(
            f"{url.host} does not resolve to an address, so that it cannot be checked",
            "correct the name, or write the Deployment in the --config file",
        )
    allowed = list(dict.fromkeys(str(sockaddr[0]) for _, _, _, _, sockaddr in found))
    for address in allowed:
        if ranges is None:
            denied = _never_denied(url.host, address) if is_never_allowed(_plain(address)) else None
        else:
            denied = check_addresses(url.host, address, ranges, url.scheme == "https")
        if denied is not None:
            return denied
    return allowed


def _plain(text: str) -> IpAddress:
    address = ipaddress.ip_address(text.partition("%")[0])
    match address:
        case ipaddress.IPv6Address(ipv4_mapped=ipaddress.IPv4Address() as inner):
            return inner
        case ipaddress.IPv6Address(sixtofour=ipaddress.IPv4Address() as inner):
            return inner
        case _:
            return address


def _never_denied(host: str, address: str) -> EgressDenied:
    where = f"{host} is at {address}" if host != address else host
    return EgressDenied(
        f"{where}, a link-local or metadata address, which no --egress-allow opens", "use the server's own address"
    )
