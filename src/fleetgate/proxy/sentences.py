"""Events that workers tell, as sentences."""

from collections.abc import Mapping

from fleetgate.core.health import REGION_S


def region_sentence(region: str, opened_s: Mapping[str, float], now_s: float) -> str:
    """Why a whole region is taken for lost."""
    names = sorted(name for name, moment_s in opened_s.items() if now_s - moment_s <= REGION_S)
    return (
        f"region {region} is taken for lost: {', '.join(names)} fell within {REGION_S:g} s; "
        "its other Deployments get one request at a time until one goes well"
    )
