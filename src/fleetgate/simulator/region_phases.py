"""The region of each request of a trace, drawn by the hour of day in each region."""

from collections.abc import Mapping, Sequence
from random import Random

from fleetgate.simulator.serving.world import Arrival

# Requests by hour of day, relative to the mean. Source: ServeGen's `m-large` workload (Alibaba Model Studio, 14 days;
# Xiang et al., arXiv 2505.09999; Apache-2.0), averaged over the days.
# fmt: off
LOAD_BY_HOUR = (
    0.99, 1.00, 0.99, 0.94, 0.91, 0.88, 0.85, 0.82, 0.79, 0.87, 1.05, 1.11,
    0.97, 0.98, 1.05, 1.05, 1.11, 1.08, 1.04, 1.14, 1.13, 1.07, 1.10, 1.09,
)
# fmt: on


class BadPhase(Exception):
    """A value of `--region-phase` cannot be parsed; the message shows the form."""


def parse_phases(text: str) -> dict[str, float]:
    """Parse `us-east=0,eu-west=8`: regions, and how many hours their day is ahead.

    Raises: `BadPhase`.
    """
    phases = {}
    for part in filter(None, text.split(",")):
        region, equals, hours = part.partition("=")
        try:
            phases[region.strip()] = float(hours)
        except ValueError:
            equals = ""
        if not equals or not region.strip():
            raise BadPhase(f"--region-phase {part!r} is not REGION=HOURS; for example us-east=0,eu-west=8")
    return phases


def assign_regions(arrivals: Sequence[Arrival], phases: dict[str, float], day_s: float, rng: Random) -> None:
    """Draw a region for each request, weighted by the load of each region at that time of a day of `day_s`."""
    regions = sorted(phases)
    for arrival in arrivals:
        hour = 24.0 * arrival.at_s / day_s
        weights = [load_at(hour + phases[region]) for region in regions]
        arrival.region = rng.choices(regions, weights)[0]


def load_at(hour: float) -> float:
    """Requests at an hour of day, relative to the mean; linear between hours."""
    low = int(hour // 1) % 24
    fraction = hour % 1.0
    return LOAD_BY_HOUR[low] * (1.0 - fraction) + LOAD_BY_HOUR[(low + 1) % 24] * fraction


def assign_proxies(arrivals: Sequence[Arrival], near: Mapping[str, Sequence[int]], rng: Random) -> None:
    """Assign each request to a proxy near its region; `near` has the candidates by region."""
    for arrival in arrivals:
        choices = near[arrival.region]
        arrival.proxy = choices[0] if len(choices) == 1 else rng.choice(choices)
