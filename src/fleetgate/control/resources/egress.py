"""The addresses to which Fleetgate may connect: every address of a URL is checked before the URL is stored.

The data plane checks again at each connect, so a name that changes its address later gets no further.
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
RESOLVE_S_MAX = 5.0  # the resolver's own first timeout; a name that takes longer is refused

# Addresses at which clouds serve a machine's own credentials, beside the link-local 169.254.0.0/16 and fe80::/10.
_METADATA = tuple(
    ipaddress.ip_network(text)
    for text in ("fd00:ec2::254/128", "100.100.100.200/32", "192.0.0.192/32", "168.63.129.16/32", "fd20:ce::254/128")
)
_METADATA_NAMES = frozenset({"metadata.google.internal", "metadata.goog", "metadata", "instance-data"})


class EgressDenied(msgspec.Struct, frozen=True):
    """The reason why an address is refused, and the fix."""

    message: str
    fix: str


def parse_ranges(texts: Iterable[str]) -> tuple[IpNetwork, ...]:
    """Parse CIDRs into networks. Raises: `ValueError` that names the text that is not a CIDR."""
    return tuple(ipaddress.ip_network(text.strip(), strict=False) for text in texts if text.strip())


def check_addresses(
    host: str, address: str, ranges: Sequence[IpNetwork], encrypted: bool = True
) -> EgressDenied | None:
    """Check one address of a host that was given through the API. The result is None if it is allowed.

    Public addresses over https are always allowed. Private addresses and plain http are allowed inside the ranges.
    """
    ip = _unwrapped(address)
    if is_never_allowed(ip):
        return _never_denied(host, address)
    if ip.is_global and encrypted:
        return None
    if any(ip in network for network in ranges if network.version == ip.version):
        return None
    listed = ", ".join(map(str, ranges)) or "no range"
    what = "over plain http, " if ip.is_global else ""
    return EgressDenied(
        f"{host} is at {address}, {what}outside the ranges allowed for URLs given through the API ({listed})",
        f"start with --egress-allow {ip}/{ip.max_prefixlen}, or write the Deployment in the --config file",
    )


def is_never_allowed(address: IpAddress) -> bool:
    """Whether an address is refused in spite of the ranges: link-local, metadata, unspecified, multicast."""
    return (
        address.is_link_local
        or address.is_unspecified
        or address.is_multicast
        or any(address in network for network in _METADATA if network.version == address.version)
    )


def check_literal(url: str) -> EgressDenied | None:
    """Check a URL that the operator wrote, without resolving its name. The result is None if it is allowed."""
    try:
        host = parse_url(url).host
    except PydanticCustomError:
        return None  # the parser reports the mistake
    if host.rstrip(".").lower() in _METADATA_NAMES:
        return _never_denied(host, host)
    try:
        # The resolver itself parses numbers, so 0x7f.1 and 2130706433 are checked as they would be dialled.
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return None
    for _, _, _, _, sockaddr in found:
        if is_never_allowed(_unwrapped(str(sockaddr[0]))):
            return _never_denied(host, str(sockaddr[0]))
    return None


async def check_url(url: str, ranges: Sequence[IpNetwork]) -> EgressDenied | None:
    """Check a URL that was given through the API: each address of its host must be allowed. None if so."""
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
    """The addresses of a URL's host, all of them allowed. Without ranges only the forbidden addresses are refused.

    Dial these addresses and not the name, so that a name that changes its address cannot redirect the connection.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(RESOLVE_S_MAX):
            found = await loop.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, TimeoutError):
        return EgressDenied(
            f"{url.host} does not resolve to an address, so it cannot be checked",
            "correct the name, or write the Deployment in the --config file",
        )
    allowed = list(dict.fromkeys(str(sockaddr[0]) for _, _, _, _, sockaddr in found))
    for address in allowed:
        if ranges is None:
            denied = _never_denied(url.host, address) if is_never_allowed(_unwrapped(address)) else None
        else:
            denied = check_addresses(url.host, address, ranges, url.scheme == "https")
        if denied is not None:
            return denied
    return allowed


def _unwrapped(text: str) -> IpAddress:
    """An address, or the IPv4 address that an IPv6 address embeds."""
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
        f"{where}, a link-local or metadata address, which --egress-allow cannot allow", "use the server's own address"
    )
