"""What is in flight, by token: one worker's hand on the token work that all workers of a machine sent to Endpoints."""

from enum import IntEnum
from math import exp
from typing import NamedTuple, Protocol

from fleetgate.core.admission.ledger import InFlightMemory, Ledger


class WorkCell(IntEnum):
    """The cells a worker keeps about what it sent to one Endpoint. DESIGN.md section 4.3: room is predicted from it."""

    PENDING_TOKENS = 0  # uncached prompt tokens whose first answer token has not come
    SEQUENCES = 1  # requests in flight
    KV_TOKENS = 2  # prompt and expected output of all of them
    HEAD_SINCE_US = 3  # since when the engine may have been working on the oldest prompt
    PREFILLED_TOKENS = 4  # ever, of prompts whose first token came
    RECENT_TOKENS = 5  # prompt tokens that were sent lately, fading over the life of an answer
    RECENT_AT_US = 6


WORK_CELLS = 7

# A member read off its enum costs 70 ns each time, a name of this module 5.
_PENDING_TOKENS, _SEQUENCES, _KV_TOKENS, _HEAD_SINCE_US, _PREFILLED_TOKENS, _RECENT_TOKENS, _RECENT_AT_US = map(
    int, WorkCell
)

# Of a prompt that the engine is working on, at most this much is taken for done before its first token proves it.
HEAD_DONE_MAX = 0.9


class TokenWork(NamedTuple):
    """What one Endpoint has to do for the requests that were sent to it and have not ended.

    Units: `pending_tokens` are uncached prompt tokens whose first answer token has not come; `sequences` counts every
    request in flight; `kv_tokens` are prompt and expected output of all of them; `recent_tokens` are prompt tokens that
    were sent lately, fading over the life of a short answer.
    """

    pending_tokens: float = 0
    sequences: float = 0
    kv_tokens: float = 0
    recent_tokens: float = 0


class WorkMemory(InFlightMemory, Protocol):
    """Memory that all workers share. Shape: `work` is [Endpoint slot][worker][Work]."""

    @property
    def work(self) -> memoryview:
        """Token work, signed 64-bit cells."""

    @property
    def milliunits(self) -> memoryview:
        """CU in flight × 1,000. Shape: [Deployment slot][worker]."""


class WorkReservation(NamedTuple):
    """What one request holds from pick to end: a place, and its token work at one Endpoint.

    Units: `milliunits` are CU × 1,000; `pending_tokens` are uncached; `window_s` is how long its prompt is recent.
    """

    slot: int
    endpoint_slot: int
    pending_tokens: int = 0
    kv_tokens: int = 0
    milliunits: int = 0
    window_s: float = 10.0


class WorkLedger:
    """Reserve, start, settle: each a few integer writes in this worker's own cells.

    Cost: 1 µs for the three together, beside the ledger's.
    """

    __slots__ = ("_milliunits", "_work", "_worker", "_workers", "ledger")

    def __init__(self, cells: WorkMemory, worker: int, ledger: Ledger) -> None:
        self._work = cells.work
        self._milliunits = cells.milliunits
        self._worker = worker
        self._workers = cells.workers
        self.ledger = ledger

    def reserve(self, hold: WorkReservation, limit: int, now_s: float) -> bool:
        """Take a place and enter the token work in one step, or say that the Deployment is full; 0 is no limit."""
        if not self.ledger.reserve(hold.slot, limit):
            return False
        work, at = self._work, self._at(hold.endpoint_slot)
        if not work[at + _PENDING_TOKENS]:
            work[at + _HEAD_SINCE_US] = int(now_s * 1e6)
        passed_s = now_s - work[at + _RECENT_AT_US] / 1e6
        work[at + _RECENT_TOKENS] = int(
            work[at + _RECENT_TOKENS] * exp(-passed_s / hold.window_s) + hold.pending_tokens
        )
        work[at + _RECENT_AT_US] = int(now_s * 1e6)
        self._enter(hold, 1)
        self._milliunits[hold.slot * self._workers + self._worker] += hold.milliunits
        return True

    def first_token(self, hold: WorkReservation, now_s: float) -> WorkReservation:
        """The first token came: the prompt is through, and the engine turns to the next one."""
        work, at = self._work, self._at(hold.endpoint_slot)
        work[at + _PENDING_TOKENS] -= hold.pending_tokens
        work[at + _PREFILLED_TOKENS] += hold.pending_tokens
        work[at + _HEAD_SINCE_US] = int(now_s * 1e6)
        return hold._replace(pending_tokens=0)

    def move(self, hold: WorkReservation, endpoint_slot: int) -> WorkReservation:
        """The token work goes to another Endpoint of the same Deployment."""
        self._enter(hold, -1)
        hold = hold._replace(endpoint_slot=endpoint_slot)
        self._enter(hold, 1)
        return hold

    def settle(self, hold: WorkReservation) -> None:
        """Give everything back.

        Raises: `SettledTwice` when this worker holds no such place.
        """
        self.ledger.settle(hold.slot)
        self._enter(hold, -1)
        self._milliunits[hold.slot * self._workers + self._worker] -= hold.milliunits

    def work_at(self, endpoint_slot: int, prompt_token_s: float, window_s: float, now_s: float) -> TokenWork:
        """The token work at an Endpoint over all workers, less what the engine must have done since its last sign.

        Cost: 0.8 µs with one worker.
        """
        ledger, at = self.ledger, endpoint_slot * self._workers
        pending: float
        recent: float
        cells = self._work[(at + ledger.first) * WORK_CELLS : (at + ledger.last) * WORK_CELLS].tolist()
        now_us = now_s * 1e6
        if len(cells) == WORK_CELLS:
            pending, sequences, kv_tokens, since_us, _, recent, recent_us = cells
            if recent:
                recent *= exp((recent_us - now_us) / (window_s * 1e6))
        else:
            pending, sequences = sum(cells[_PENDING_TOKENS::WORK_CELLS]), sum(cells[_SEQUENCES::WORK_CELLS])
            kv_tokens, since_us = sum(cells[_KV_TOKENS::WORK_CELLS]), max(cells[_HEAD_SINCE_US::WORK_CELLS])
            fades = zip(cells[_RECENT_TOKENS::WORK_CELLS], cells[_RECENT_AT_US::WORK_CELLS], strict=True)
            recent = sum(tokens * exp((sent - now_us) / (window_s * 1e6)) for tokens, sent in fades)
        if pending:
            done = (now_us - since_us) / (prompt_token_s * 1e6)
            pending -= done if done < pending * HEAD_DONE_MAX else pending * HEAD_DONE_MAX
        return TokenWork(pending, sequences, kv_tokens, recent)

    def sequences(self, endpoint_slot: int) -> int:
        """Requests in flight at an Endpoint over all workers."""
        at = endpoint_slot * self._workers * WORK_CELLS
        return sum(self._work[at : at + self._workers * WORK_CELLS][_SEQUENCES::WORK_CELLS])

    def prefilled_tokens(self, endpoint_slot: int) -> int:
        """Prompt tokens ever prefilled at an Endpoint for this machine, by prompts whose first token came."""
        at = endpoint_slot * self._workers * WORK_CELLS
        return sum(self._work[at : at + self._workers * WORK_CELLS][_PREFILLED_TOKENS::WORK_CELLS])

    def _enter(self, hold: WorkReservation, sign: int) -> None:
        work, at = self._work, self._at(hold.endpoint_slot)
        work[at + _PENDING_TOKENS] += sign * hold.pending_tokens
        work[at + _SEQUENCES] += sign
        work[at + _KV_TOKENS] += sign * hold.kv_tokens

    def _at(self, endpoint_slot: int) -> int:
        return (endpoint_slot * self._workers + self._worker) * WORK_CELLS
