"""The file of `--record`: every decision with its inputs, and the end of every request."""

import time
from collections.abc import Collection

from fleetgate.core.routing.decision_record import RecordedEnd, RequestIdentity, encode_record, record_decision
from fleetgate.core.routing.route import Rejection
from fleetgate.core.routing.scheduler import ConsideredDecision, Placement, ScheduleRequest
from fleetgate.proxy.telemetry.line_log import LineLog


class DecisionLog:
    """Writes one worker's records. Cost: 9 µs a request with three Deployments.

    A record has the names of keys, Gateways, models and Deployments; it has no prompt, no response and no secret.
    Raises: `OSError` when the file cannot be opened.
    """

    def __init__(self, target: str, region: str, worker: int) -> None:
        self.log = LineLog(target)
        self._region, self._worker = region, worker

    def identity(self, request_id: bytes, gateway: str, model: str, key: str) -> RequestIdentity:
        """The names of a request for its records, with the present time."""
        return RequestIdentity(time.time(), request_id.decode(), gateway, model, key, self._region, self._worker)

    def decided(
        self,
        identity: RequestIdentity,
        considered: ConsideredDecision,
        request: ScheduleRequest,
        tried: Collection[int],
        placed: Placement | Rejection,
    ) -> None:
        """Record a decision."""
        chosen = "" if isinstance(placed, Rejection) else placed.candidate.name
        self.log.add(encode_record(record_decision(identity, considered, request, tried, chosen)))

    def ended(self, end: RecordedEnd) -> None:
        """Record the end of a request."""
        self.log.add(encode_record(end))
