"""`python -m bench.routing.decision`: what one decision costs: route, predict, reserve, start, settle."""

import sys
import time
from collections import deque
from functools import partial

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
WISH = ScheduleRequest(RequestShape(1000.0, 200.0))
ROUNDS, DECISIONS = 20, 1000
BUSY = 5  # requests that each Deployment has in hand meanwhile
LOAD = 0.3  # of what they carry comes in


class Bed:
    """A Lane of so many Deployments, each of which has work in hand."""

    def __init__(self, count: int, strategy: str) -> None:
        board = SharedMemory(memoryview(bytearray(SharedMemory.bytes_needed(1))), 1)
        self.books = WorkLedger(board, 0, Ledger(board, 0))
        deployments = tuple(map(_deployment, range(count)))
        upstreams = tuple(Upstream(deployment=deployment.name, rank=1) for deployment in deployments)
        gateway = Gateway(
            slot=0, name="chat", domain="example.com", protocol="openai", strategy=strategy, upstreams=upstreams
        )
        snapshot = Snapshot(version=1, made_at_s=0.0, gateways=(gateway,), deployments=deployments)
        self.desk = Scheduler(gateway, model_routes(gateway, snapshot, "us-east")["m"])
        self.views: dict[int, DeploymentView] = {
            one.slot: OnlineEstimate(one, Slo()).view(Observation(1.0, (EndpointCapacity(one.slot),)))
            for one in deployments
        }
        self._step_s = 1.0 / (LOAD * PROFILE.units * count)
        self._now_s = 1.0
        self._held: deque[WorkReservation] = deque()
        for _ in range(BUSY * count):
            self._held.append(self.books.first_token(self._place().reservation, self._now_s))

    def turn(self) -> None:
        """A request comes and is placed; the one that was placed before all others ends."""
        self._held.append(self.books.first_token(self._place().reservation, self._now_s))
        self.books.settle(self._held.popleft())

    def _place(self) -> Placement:
        self._now_s += self._step_s
        placed = self.desk.place(WISH, self.views, self.books, self._now_s)
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


def cost_us(bed: Bed) -> float:
    """The CPU time of a decision with all that its place needs later, the best of a few rounds."""
    best_us = float("inf")
    for _ in range(ROUNDS):
        began_s = time.process_time()
        for _ in range(DECISIONS):
            bed.turn()
        best_us = min(best_us, (time.process_time() - began_s) / DECISIONS * 1e6)
    return best_us


def main() -> int:
    """Measure and tell."""
    say = partial(print, file=sys.stdout)
    say("| strategy | 1 | 3 | 16 Deployments |\n|---|---|---|---|")
    for strategy in ("overflow", "capacity_round_robin", "least_cost"):
        strategies.find(strategy)
        costs = [f"{cost_us(Bed(count, strategy)):.1f} µs" for count in (1, 3, 16)]
        say(f"| {strategy} | {' | '.join(costs)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
