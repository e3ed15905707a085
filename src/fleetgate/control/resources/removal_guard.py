"""A change that removes many Endpoints at once may be a mistake and needs a confirmation. Source: faults.md row 52."""

from collections.abc import Mapping
from typing import Any

CONFIRM_ENDPOINTS_MIN = 10
CONFIRM_SHARE_MIN = 0.3
CONFIRM_FIX = "send it again with `confirmed: true` (the CLI's --yes) if it is intended"
Documents = Mapping[tuple[str, str], Mapping[str, Any]]  # the documents as written, by kind and name


class ConfirmationRequired(Exception):
    """A change needs a confirmation; the text says what it removes."""


def endpoints_by_gateway(documents: Documents) -> dict[str, set[str]]:
    """The Endpoints of each Gateway: the written URLs, or the committed replicas."""
    found: dict[str, set[str]] = {}
    for (kind, name), document in documents.items():
        if kind == "Gateway":
            upstreams = [upstream["deployment"] for upstream in document["upstreams"]]
            found[name] = {
                one for each in upstreams for one in _endpoints(each, documents.get(("Deployment", each), {}))
            }
    return found


def removal_warning(before: Documents, after: Documents) -> str:
    """What a change removes, as a sentence. Empty if it needs no confirmation.

    Deleting a Gateway by its name removes its last Endpoint too and needs no confirmation.
    """
    had, has = endpoints_by_gateway(before), endpoints_by_gateway(after)
    empty = sorted(name for name, endpoints in has.items() if not endpoints and had.get(name))
    if empty:
        return f"this leaves Gateway {', '.join(empty)} without an Endpoint; {CONFIRM_FIX}"
    all_before = set[str]().union(*had.values())
    gone = all_before - set[str]().union(*has.values())
    if len(gone) < CONFIRM_ENDPOINTS_MIN or len(gone) <= CONFIRM_SHARE_MIN * len(all_before):
        return ""
    share = round(100 * len(gone) / len(all_before))
    return f"this removes {len(gone)} of {len(all_before)} Endpoints ({share} %); {CONFIRM_FIX}"


def _endpoints(name: str, deployment: Mapping[str, Any]) -> set[str]:
    if "workload" in deployment:
        replicas = deployment.get("replicas") or {}
        return {f"{name} replica {number}" for number in range(int(replicas.get("committed", 1)))}
    urls = deployment.get("urls") or ([deployment["url"]] if deployment.get("url") else [])
    return {f"{name} {url}" for url in urls}
