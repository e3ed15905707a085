"""Leases: the share of a Deployment's concurrency that one proxy may use, divided anew every second by demand.

Proxies that only exchanged their load would all fill the same gap at once; a divided limit cannot be used twice.
"""

from collections.abc import Mapping
from hashlib import blake2b

import msgspec

LEASE_S = 3.0  # three missed renewals; then the share is given to other proxies
LOST_SHARE = 0.8  # of its lease that a proxy uses while it cannot renew: its share may be given away by then
SLOTS_MIN = 4  # a smaller share is too coarse to be useful, so fewer proxies get one


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
        """The lease as it may be used now: reduced once its renewal is overdue."""
        if now_s <= self.until_s:
            return self
        return Lease(int(self.slots * LOST_SHARE), self.share * LOST_SHARE, self.until_s)


def divide(limit: int, demands: Mapping[str, LeaseDemand], deployment: str = "") -> dict[str, int]:
    """Divide a limit: requests in flight stay covered, then one slot for each proxy, the rest in proportion to demand.

    The sum exceeds `limit` only if the requests in flight already do. The order of the mapping changes nothing. If the
    limit is small against the number of proxies, some get none: the same ones for a Deployment every time.
    """
    slots = {proxy: demand.in_flight for proxy, demand in demands.items()}
    free = limit - sum(slots.values())
    members = _members(limit, demands, deployment)
    for proxy in members:
        if free > 0 and slots[proxy] == 0:
            slots[proxy] = 1
            free -= 1
    missing = {proxy: max(0.0, demands[proxy].demand - slots[proxy]) + 1e-9 for proxy in members}
    total = sum(sorted(missing.values()))
    if free <= 0 or not members:
        return slots
    exact = {proxy: free * missing[proxy] / total for proxy in members}
    for proxy in members:
        slots[proxy] += int(exact[proxy])
    left = free - sum(int(part) for part in exact.values())
    by_remainder = sorted(members, key=lambda proxy: (int(exact[proxy]) - exact[proxy], proxy))
    for proxy in by_remainder[:left]:
        slots[proxy] += 1
    return slots


def _members(limit: int, demands: Mapping[str, LeaseDemand], deployment: str) -> list[str]:
    """The proxies that share a Deployment, chosen by rendezvous hashing if there are too many for its limit."""
    members_max = max(1, limit // SLOTS_MIN)
    if len(demands) <= members_max:
        return sorted(demands)

    def weight(proxy: str) -> bytes:
        return blake2b(f"{deployment}\n{proxy}".encode(), digest_size=8).digest()

    return sorted(sorted(demands, key=weight)[:members_max])
