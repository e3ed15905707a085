"""`python -m bench.routing.decision`: the cost of one decision: route, predict, reserve, start, settle."""

import sys
import time
from collections import deque

from fleetgate.core.admission.ledger import Ledger
from fleetgate.core.admission.work_ledger import WorkLedger, WorkReservation
from fleetgate.core.capacity.deployment_view import DeploymentView, EndpointCapacity
from fleetgate.core.capacity.latency_model import RequestShape
from fleetgate.core.capacity.online_estimate import Observation, OnlineEstimate
from fleetgate.core.model import Deployment, Endpoint, Gateway, Profile, Slo, Snapshot, Upstream
from fleetgate.core.routing import strategies
from fleetgate.core.routing.route import model_routes
from fleetgate.core.routing.scheduler import Placement, Scheduler, ScheduleRequest
from fleetgate.ipc.shared_memory import SharedMemory

PROFILE = Profile(
    name="h100",
    prefill_tokens_per_s=15_000,
    base_s=0.028,
    per_sequence_s=0.00035,
    batch_max=128,
    kv_tokens=1_200_000,
    units=3.2,
)
REQUEST = ScheduleRequest(RequestShape(1000.0, 200.0))
ROUNDS, DECISIONS = 20, 1000
BUSY = 5  # requests in flight at each Deployment during the measurement
LOAD = 0.3  # offered load, as a share of capacity


class BusyRoute:
    """A model route of `count` busy Deployments."""

    def __init__(self, count: int, strategy: str) -> None:
        memory = SharedMemory(memoryview(bytearray(SharedMemory.bytes_needed(1))), 1)
        self.work_ledger = WorkLedger(memory, 0, Ledger(memory, 0))
        deployments = tuple(map(_deployment, range(count)))
        upstreams = tuple(Upstream(deployment=deployment.name, rank=1) for deployment in deployments)
        gateway = Gateway(
            slot=0, name="chat", domain="example.com", protocol="openai", strategy=strategy, upstreams=upstreams
        )
        snapshot = Snapshot(version=1, made_at_s=0.0, gateways=(gateway,), deployments=deployments)
        self.scheduler = Scheduler(gateway, model_routes(gateway, snapshot, "us-east")["m"])
        self.views: dict[int, DeploymentView] = {
            deployment.slot: OnlineEstimate(deployment, Slo()).view(
                Observation(1.0, (EndpointCapacity(deployment.slot),))
            )
            for deployment in deployments
        }
        self._step_s = 1.0 / (LOAD * PROFILE.units * count)
        self._now_s = 1.0
        self._reservations: deque[WorkReservation] = deque()
        for _ in range(BUSY * count):
            self._reservations.append(self.work_ledger.first_token(self._place().reservation, self._now_s))

    def decide(self) -> None:
        """Place a request, and end the oldest one."""
        self._reservations.append(self.work_ledger.first_token(self._place().reservation, self._now_s))
        self.work_ledger.settle(self._reservations.popleft())

    def _place(self) -> Placement:
        self._now_s += self._step_s
        placed = self.scheduler.place(REQUEST, self.views, self.work_ledger, self._now_s)
        assert isinstance(placed, Placement)
        return placed


def _deployment(slot: int) -> Deployment:
    endpoint = Endpoint(slot=slot, scheme="http", host="127.0.0.1", port=1, base_path="/v1")
    return Deployment(
        slot=slot,
        name=f"d{slot}",
        region="us-east",
        engine="vllm",
        models={"m": "m"},
        endpoints=(endpoint,),
        profile=PROFILE,
        units=3.2,
    )


def cost_us(route: BusyRoute) -> float:
    """The CPU time of a decision with the start and the end of its reservation; the best of several rounds."""
    best_us = float("inf")
    for _ in range(ROUNDS):
        began_s = time.process_time()
        for _ in range(DECISIONS):
            route.decide()
        best_us = min(best_us, (time.process_time() - began_s) / DECISIONS * 1e6)
    return best_us


def main() -> int:
    """Measure and print."""
    print("| strategy | 1 | 3 | 16 Deployments |\n|---|---|---|---|")
    for strategy in ("overflow", "capacity_round_robin", "least_cost"):
        strategies.find(strategy)
        costs = [f"{cost_us(BusyRoute(count, strategy)):.1f} µs" for count in (1, 3, 16)]
        print(f"| {strategy} | {' | '.join(costs)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
