"""Which region a request of a trace comes from: as written, all from one, or by the hour of day there."""

from collections.abc import Mapping, Sequence
from random import Random

from fleetgate.simulator.world import Arrival

# Requests by hour of day, relative to the mean: ServeGen's `m-large` workload (Alibaba Model Studio, 14 days; Xiang et
# al., arXiv 2505.09999; Apache-2.0), averaged by us.
# fmt: off
DAY = (
    0.99, 1.00, 0.99, 0.94, 0.91, 0.88, 0.85, 0.82, 0.79, 0.87, 1.05, 1.11,
    0.97, 0.98, 1.05, 1.05, 1.11, 1.08, 1.04, 1.14, 1.13, 1.07, 1.10, 1.09,
)
# fmt: on


class BadPhase(Exception):
    """A mark of `--region-phase` cannot be read; the text shows the form."""


def parse_phases(text: str) -> dict[str, float]:
    """Read `us-east=0,eu-west=8`: regions, and by how many hours their day is ahead.

    Raises: `BadPhase`.
    """
    phases = {}
    for mark in filter(None, text.split(",")):
        region, equals, hours = mark.partition("=")
        try:
            phases[region.strip()] = float(hours)
        except ValueError:
            equals = ""
        if not equals or not region.strip():
            raise BadPhase(f"--region-phase {mark!r} is not REGION=HOURS; for example us-east=0,eu-west=8")
    return phases


def assign_regions(arrivals: Sequence[Arrival], phases: dict[str, float], day_s: float, rng: Random) -> None:
    """Give each request a region, by how busy each region is at that time of a day that lasts `day_s`."""
    regions = sorted(phases)
    for arrival in arrivals:
        hour = 24.0 * arrival.at_s / day_s
        weights = [busy_at(hour + phases[region]) for region in regions]
        arrival.region = rng.choices(regions, weights)[0]


def busy_at(hour: float) -> float:
    """Requests at an hour of day, relative to the mean; between hours in a straight line."""
    low = int(hour // 1) % 24
    part = hour % 1.0
    return DAY[low] * (1.0 - part) + DAY[(low + 1) % 24] * part


def assign_proxies(arrivals: Sequence[Arrival], near: Mapping[str, Sequence[int]], rng: Random) -> None:
    """The proxy of each request: one of those that are near its region."""
    for arrival in arrivals:
        choices = near[arrival.region]
        arrival.proxy = choices[0] if len(choices) == 1 else rng.choice(choices)
