"""Round-trip times between regions, from published measurements. `data/README.md` says whose."""

import csv
import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files

_NUMBER = re.compile(r"-?\d+$")


@cache
def _table() -> dict[tuple[str, str], float]:
    rows = csv.DictReader((files("fleetgate.simulator") / "data" / "rtt_ms.csv").read_text().splitlines())
    found = {}
    for row in rows:
        for pair in ((row["from"], row["to"]), (row["to"], row["from"])):
            found[pair] = float(row["rtt_ms_p50"]) / 1000
    return found


@cache
def _nearest() -> dict[str, str]:
    """Region names of any cloud, with and without their number, and the measured region next to each."""
    known = {name: name for pair in _table() for name in pair}
    known |= {name.replace("-", ""): name for name in known}
    rows = csv.DictReader((files("fleetgate.simulator") / "data" / "regions.csv").read_text().splitlines())
    loose: dict[str, str] = {}
    for row in rows:
        known.setdefault(row["region"], row["nearest"])
        loose.setdefault(_NUMBER.sub("", row["region"]), row["nearest"])
    return {**loose, **known}


class Rtts:
    """Looks pairs up; of a region that it does not know it tells `warn` once and takes 0 s."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._warned: set[str] = set()

    def between_s(self, one: str, other: str) -> float:
        """The median round trip between two regions; 0 inside one, and to or from an unknown one."""
        if one == other or not one or not other:
            return 0.0
        near = [self._find(name) for name in (one, other)]
        if near[0] is None or near[1] is None or near[0] == near[1]:
            return 0.0
        return _table().get((near[0], near[1]), 0.0)

    def spelt(self, region: str, homes: Sequence[str]) -> str:
        """A region as Deployments spell the same place: `us-east-1` for `us-east` where that is theirs."""
        if not region or region in homes:
            return region
        place = _nearest().get(region.lower())
        return next((home for home in homes if place and _nearest().get(home.lower()) == place), region)

    def _find(self, region: str) -> str | None:
        found = _nearest().get(region.lower())
        if found is None and region not in self._warned:
            self._warned.add(region)
            self._warn(f"region {region!r} is not known, so its round-trip times count as 0 s")
        return found
