"""Leases: the share of a Deployment's concurrency that one proxy may hand out, re-divided every second by demand.

Gossip about load would let every proxy fill the same gap at once; what is divided cannot be handed out twice.
Source: ALGORITHMS.md section 8.5.
"""

from collections.abc import Mapping
from hashlib import blake2b

import msgspec

LEASE_S = 3.0  # three missed renewals: what nobody renews goes back
LOST_SHARE = 0.8  # of its lease that a proxy goes on with while it cannot renew: its share may be given away by then
SLOTS_LEAST = 4  # below this a proxy's share is too coarse to be of use, so fewer proxies get one


class LeaseDemand(msgspec.Struct, frozen=True):
    """What a proxy reports at renewal. Units: requests it has in flight; requests it could use, waiting ones too."""

    in_flight: int
    demand: float


class Lease(msgspec.Struct, frozen=True):
    """A proxy's part of one Deployment. Units: `slots` in requests; `share` of the Deployment, 0 to 1."""

    slots: int
    share: float
    until_s: float

    def now(self, now_s: float) -> "Lease":
        """The lease as it may be used now: a little less once it should have been renewed."""
        if now_s <= self.until_s:
            return self
        return Lease(int(self.slots * LOST_SHARE), self.share * LOST_SHARE, self.until_s)


def divide(limit: int, wanted: Mapping[str, LeaseDemand], deployment: str = "") -> dict[str, int]:
    """Divide a limit: what is in flight stays covered, then one slot each, the rest in proportion to demand.

    The sum never exceeds `limit` unless what is in flight already does. The order of the mapping changes nothing.
    Where the limit is small against the number of proxies, some get none: the same ones for a Deployment every time.
    """
    slots = {proxy: wish.in_flight for proxy, wish in wanted.items()}
    free = limit - sum(slots.values())
    members = _members(limit, wanted, deployment)
    for proxy in members:
        if free > 0 and slots[proxy] == 0:
            slots[proxy] = 1
            free -= 1
    more = {proxy: max(0.0, wanted[proxy].demand - slots[proxy]) + 1e-9 for proxy in members}
    total = sum(sorted(more.values()))
    if free <= 0 or not members:
        return slots
    exact = {proxy: free * more[proxy] / total for proxy in members}
    for proxy in members:
        slots[proxy] += int(exact[proxy])
    left = free - sum(int(part) for part in exact.values())
    by_rest = sorted(members, key=lambda proxy: (int(exact[proxy]) - exact[proxy], proxy))
    for proxy in by_rest[:left]:
        slots[proxy] += 1
    return slots


def _members(limit: int, wanted: Mapping[str, LeaseDemand], deployment: str) -> list[str]:
    """The proxies that share a Deployment, by rendezvous hashing where there are too many for its limit."""
    places = max(1, limit // SLOTS_LEAST)
    if len(wanted) <= places:
        return sorted(wanted)

    def weight(proxy: str) -> bytes:
        return blake2b(f"{deployment}\n{proxy}".encode(), digest_size=8).digest()

    return sorted(sorted(wanted, key=weight)[:places])
