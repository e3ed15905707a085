"""Whether a second attempt beside a slow first one is due: late, rarely, and only while there is room to spare."""

from fleetgate.core.health.hedge_policy import has_spare_capacity, may_hedge
from fleetgate.proxy.request.request_context import ReceivedRequest
from fleetgate.proxy.request.reservation import CapacityAccounts, PlacementRequest
from fleetgate.proxy.routing.model_route import ModelRouteState


def is_hedge_due(
    received: ReceivedRequest,
    route: ModelRouteState,
    request: PlacementRequest | None,
    accounts: CapacityAccounts,
    started_s: float,
    now_s: float,
) -> bool:
    """Whether the first attempt is slow, its priority is hedged, there is room to spare, and the budget allows it."""
    if request is None or not may_hedge(route.gateway.spec.resilience.hedge, request.priority):
        return False
    if now_s - started_s < route.hedge_threshold.threshold_s(request.shape.prompt_tokens):
        return False
    loads = route.scheduler.loads
    loads.refresh(accounts.tracker.views, accounts.work_ledger, now_s)
    return has_spare_capacity(loads.load.values()) and received.context.budget.take(now_s)
