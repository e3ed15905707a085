"""Round-trip times between regions, from published measurements. Source: data/README.md."""

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
    """The nearest measured region for region names of any cloud, with and without their number."""
    known = {name: name for pair in _table() for name in pair}
    known |= {name.replace("-", ""): name for name in known}
    rows = csv.DictReader((files("fleetgate.simulator") / "data" / "regions.csv").read_text().splitlines())
    without_number: dict[str, str] = {}
    for row in rows:
        known.setdefault(row["region"], row["nearest"])
        without_number.setdefault(_NUMBER.sub("", row["region"]), row["nearest"])
    return {**without_number, **known}


class RegionRtts:
    """Looks up round-trip times; it warns once about each unknown region and takes 0 s for it."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._warned: set[str] = set()

    def between_s(self, one: str, other: str) -> float:
        """The median round trip between two regions; 0 inside a region, and for an unknown one."""
        if one == other or not one or not other:
            return 0.0
        near = [self._find(name) for name in (one, other)]
        if near[0] is None or near[1] is None or near[0] == near[1]:
            return 0.0
        return _table().get((near[0], near[1]), 0.0)

    def match(self, region: str, known: Sequence[str]) -> str:
        """The name among `known` for the same region: `us-east-1` for `us-east`; otherwise the region itself."""
        if not region or region in known:
            return region
        nearest = _nearest().get(region.lower())
        return next((name for name in known if nearest and _nearest().get(name.lower()) == nearest), region)

    def _find(self, region: str) -> str | None:
        found = _nearest().get(region.lower())
        if found is None and region not in self._warned:
            self._warned.add(region)
            self._warn(f"region {region!r} is not known, so its round-trip times count as 0 s")
        return found
