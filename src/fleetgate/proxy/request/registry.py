"""The requests of one worker: those in flight and those that wait for a slot."""

import os
from collections.abc import Callable, Sequence
from typing import Protocol

from fleetgate.core.admission.request_queue import QueueEntry
from fleetgate.core.exchange import Refuse
from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell
from fleetgate.proxy.request.request_context import ReceivedRequest
from fleetgate.proxy.routing.endpoint_state import EndpointState
from fleetgate.proxy.routing.model_route import ModelRouteState

QUEUE_TRIES_MAX = 4  # queued requests that try for a slot at a time, so that one too large for it blocks no other

SILENT_S = 2.0  # waiting longer at an Endpoint that probes cannot reach, a request moves


class RegisteredRequest(Protocol):
    """A request in flight, as the registry uses it."""

    received: ReceivedRequest
    first_s: float  # when the client got its first content, 0 before it

    @property
    def route(self) -> ModelRouteState:
        """The route that it waits for."""

    @property
    def endpoint(self) -> EndpointState | None:
        """The Endpoint of its current attempt, None without one."""

    def on_internal_error(self, error: BaseException) -> None:
        """End it by an internal error."""

    def terminate(self, why: Refuse) -> None:
        """End it with an error while its client is connected."""

    def retry_placement(self) -> bool:
        """Look for a slot. True if it found one or ended."""

    def shed(self) -> None:
        """Leave the queue for a request of higher priority."""

    def change_route(self) -> None:
        """Move to the route of a new Snapshot."""

    def tick(self, now_s: float, furthest: dict[int, int] | None) -> None:
        """Check its deadlines; with `furthest`, once a second, its progress too."""

    def move_from(self, endpoint: EndpointState, silent_s: float, now_s: float) -> None:
        """Move, if it has waited at this Endpoint for its first event longer than `silent_s`."""


class RequestRegistry:
    """One worker's requests. Shape: `wake_fds` are the write ends of every worker's wake pipe, by column."""

    def __init__(
        self,
        shared: SharedMemory,
        worker: int,
        wake_fds: Sequence[int],
        call_soon: Callable[[Callable[[], None]], object],
        clock: Callable[[], float],
    ) -> None:
        self._clock = clock
        self._shared = shared
        self._worker = worker
        self._wake_fds = wake_fds
        self._call_soon = call_soon
        self._waiting: dict[QueueEntry, RegisteredRequest] = {}
        self.in_flight: dict[RegisteredRequest, None] = {}
        self.other_workers: list[int] = []  # columns of workers with requests that may wait for the same Deployments

    def count_with(self, columns: range) -> None:
        """Set the workers with requests that may wait for a slot of the same Deployments."""
        self.other_workers = [column for column in columns if column != self._worker]

    # --- the queue ---

    @property
    def waiting(self) -> list[RegisteredRequest]:
        """The waiting requests."""
        return list(self._waiting.values())

    @property
    def has_waiting(self) -> bool:
        """Whether this request waits."""
        return bool(self._waiting)

    def total_waiting(self, gateway_slot: int) -> int:
        """The number of requests that wait in a Gateway, in all workers."""
        return self._shared.waiting_total(gateway_slot)

    def shed(self, entry: QueueEntry) -> None:
        """Make the request of a queue entry leave."""
        self._waiting[entry].shed()

    def join(self, entry: QueueEntry, request: RegisteredRequest, ahead: bool) -> None:
        """Put a request into its route's queue. Shape: `ahead` of new requests if it has moved."""
        request.route.queue.join(entry, ahead=ahead)
        self._waiting[entry] = request
        self._count_waiting(request.route, 1)

    def leave(self, entry: QueueEntry, request: RegisteredRequest, served: bool) -> None:
        """Remove a request from its queue."""
        request.route.queue.leave(entry, served)
        self._waiting.pop(entry, None)
        self._count_waiting(request.route, -1)

    def _count_waiting(self, route: ModelRouteState, change: int) -> None:
        shared, worker = self._shared, self._worker
        shared.waiting[route.gateway.spec.slot * shared.workers + worker] += change
        shared.set(worker, WorkerCell.WAITING, shared.get(worker, WorkerCell.WAITING) + change)

    # --- slots that become free ---

    def slot_freed(self) -> None:
        """Let waiting requests look for a free slot, here first, then in the other workers."""
        if self._waiting:
            self._call_soon(self.wake)
        for worker in self.other_workers:
            if self._shared.get(worker, WorkerCell.WAITING):
                try:
                    os.write(self._wake_fds[worker], b"\x01")
                except OSError:  # the pipe is full, so that worker is awake already; or its process has ended
                    pass

    def wake_soon(self) -> None:
        """Let the waiting requests look for a slot soon: a change may have freed one."""
        if self._waiting:
            self._call_soon(self.wake)

    def wake(self) -> None:
        """Let the first of each route's queue look for a slot, and the next, until one finds none."""
        routes = {request.route: None for request in self._waiting.values()}
        for route in routes:
            found = True
            while found:  # each success changes the capacity for the next request
                entries = route.queue.next_entries(QUEUE_TRIES_MAX)
                found = any(self._retry(self._waiting[entry]) for entry in entries)

    @staticmethod
    def _retry(request: RegisteredRequest) -> bool:
        try:
            return request.retry_placement()
        except Exception as error:
            request.on_internal_error(error)
            return True

    # --- requests in flight ---

    def others_at(self, endpoint: EndpointState, request: object) -> tuple[int, int]:
        """The number of other requests at an Endpoint, and of those without content yet."""
        others = [one for one in self.in_flight if one.endpoint is endpoint and one is not request]
        return len(others), sum(not one.first_s for one in others)

    def tick(self, now_s: float, furthest: dict[int, int] | None) -> None:
        """Check every request in flight, every 50 ms. Shape: as `RegisteredRequest.tick`."""
        for request in list(self.in_flight):
            try:
                request.tick(now_s, furthest)
            except Exception as error:
                request.on_internal_error(error)

    def move_silent_soon(self, endpoint: EndpointState) -> None:
        """Move the requests that wait at an unreachable Endpoint for a first event."""
        self._call_soon(lambda: self._move_silent(endpoint))

    def _move_silent(self, endpoint: EndpointState) -> None:
        now_s = self._clock()
        for request in list(self.in_flight):
            request.move_from(endpoint, SILENT_S, now_s)
