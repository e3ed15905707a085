"""What a change takes away: so much at once may be a mistake, and is asked about first. FAULTS.md row 52."""

from collections.abc import Mapping
from typing import Any

CONFIRM_ENDPOINTS_MIN = 10
CONFIRM_SHARE_MIN = 0.3
CONFIRM_FIX = "send it again with `confirmed: true` (the CLI's --yes) if it is meant"
Documents = Mapping[tuple[str, str], Mapping[str, Any]]  # by kind and name: the document as written


class ConfirmationRequired(Exception):
    """A change that somebody has to confirm; the text says what it takes away."""


def endpoints_by_gateway(world: Documents) -> dict[str, set[str]]:
    """The Endpoints that each Gateway can send to: the URLs written, or the replicas that are always kept running."""
    found: dict[str, set[str]] = {}
    for (kind, name), document in world.items():
        if kind == "Gateway":
            upstreams = [upstream["deployment"] for upstream in document["upstreams"]]
            found[name] = {one for each in upstreams for one in _endpoints(each, world.get(("Deployment", each), {}))}
    return found


def removal_warning(before: Documents, after: Documents) -> str:
    """The sentence that asks, empty where there is nothing to ask.

    A Gateway that is deleted by its name takes its own last Endpoint along; that is what was said.
    """
    had, has = endpoints_by_gateway(before), endpoints_by_gateway(after)
    bare = sorted(name for name, endpoints in has.items() if not endpoints and had.get(name))
    if bare:
        return f"this leaves Gateway {', '.join(bare)} without an Endpoint; {CONFIRM_FIX}"
    all_before = set[str]().union(*had.values())
    gone = all_before - set[str]().union(*has.values())
    if len(gone) < CONFIRM_ENDPOINTS_MIN or len(gone) <= CONFIRM_SHARE_MIN * len(all_before):
        return ""
    share = round(100 * len(gone) / len(all_before))
    return f"this takes {len(gone)} of {len(all_before)} Endpoints ({share} %) out of use; {CONFIRM_FIX}"


def _endpoints(name: str, deployment: Mapping[str, Any]) -> set[str]:
    if "workload" in deployment:
        replicas = deployment.get("replicas") or {}
        return {f"{name} replica {number}" for number in range(int(replicas.get("committed", 1)))}
    urls = deployment.get("urls") or ([deployment["url"]] if deployment.get("url") else [])
    return {f"{name} {url}" for url in urls}
