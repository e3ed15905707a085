"""Events that workers tell, as sentences."""

from collections.abc import Mapping

from fleetgate.core.health.circuit_breaker import BreakerState, EndpointHealth, Signal
from fleetgate.core.health.outlier_detection import REGION_S
from fleetgate.core.model import Deployment, Endpoint

_BECAUSE = {
    Signal.BROKE: "its answers break",
    Signal.UNREACHABLE: "it cannot be connected to",
    Signal.PROBE_BROKE: "it does not answer its probes",
    Signal.SLOW: "it is several times slower than usual, and others can take its work",
}


def out_sentence(endpoint: Endpoint, health: EndpointHealth, sign: Signal, now_s: float) -> str:
    """Why an Endpoint gets no requests."""
    for_s = health.open_until_s - now_s
    if health.breaker is BreakerState.DENIED:
        return (
            f"{endpoint.origin} refuses the Deployment's credential and gets no requests for {for_s:.0f} s; "
            "renew the Secret that `credential` names"
        )
    return f"{endpoint.origin} is out for {for_s:.1f} s: {_BECAUSE.get(sign, 'its answers break')}"


def lacks_sentence(deployment: Deployment, model: str, path: str) -> str:
    """Why a Deployment is not asked for one of its models."""
    upstream = deployment.models.get(model, model)
    return (
        f"{deployment.name} answers 404 for model {model} (asked for as {upstream}) at {path} and is not asked for it "
        "there while others serve it; correct its `models`, unless its engine only lacks that path"
    )


def panic_sentence(gateway: str, model: str) -> str:
    """Why requests fail at once."""
    return f"every Deployment for model {model} of Gateway {gateway} is out; each is tried once a second"


def poison_sentence(request_id: str, origins: list[str]) -> str:
    """Why a request was given up."""
    return f"request {request_id} ended the engines at {' and '.join(origins)} and is not tried again"


def region_sentence(region: str, out_s: Mapping[str, float], now_s: float) -> str:
    """Why a whole region is taken for lost."""
    names = sorted(name for name, moment_s in out_s.items() if now_s - moment_s <= REGION_S)
    return (
        f"region {region} is taken for lost: {', '.join(names)} went out within {REGION_S:g} s; "
        "its other Endpoints get one request at a time until one goes well"
    )
