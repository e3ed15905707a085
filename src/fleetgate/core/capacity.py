"""How much of a Deployment is free, in units that unlike GPUs can be compared by."""

# A Deployment back from ejection starts at a tenth of its weight and has all of it after this long, so that a cold
# cache does not meet a full load. ALGORITHMS.md section 8.1.
SLOW_START_S = 60.0
SLOW_START_MIN = 0.1


def slow_start(since_recovery_s: float) -> float:
    """The share of its weight that a Deployment may have so long after it came back, 0.1 to 1."""
    return min(1.0, max(SLOW_START_MIN, since_recovery_s / SLOW_START_S))


def available_units(health: float, units: float, in_flight: int, limit: int) -> float:
    """Free capacity in CU: `health × units × (1 − in flight / limit)`, never negative.

    Shape: `health` is breaker times slow start, 0 to 1; a limit of 0 means none, and then the load takes nothing away.
    Source: ALGORITHMS.md section 8.1.
    """
    if limit <= 0:
        return health * units
    return health * units * max(0.0, 1.0 - in_flight / limit)


def normalised_load(units: float, in_flight: int) -> float:
    """Requests in flight per CU, counting the one that is about to join: how unlike Deployments compare when full."""
    return (in_flight + 1) / units


def spill_limit(limit: int, overflow_at: float) -> int:
    """The in-flight count at which a rank counts as full; a limit of 1 counts as 1, and 0 stays "no limit"."""
    if limit <= 1:
        return limit
    return max(1, int(limit * overflow_at))
