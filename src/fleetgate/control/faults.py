"""Injected faults: begun and ended here, put in force by the workers, who read file and clock themselves."""

import asyncio
import secrets
import threading
import time
from collections import deque
from pathlib import Path

import msgspec
import structlog

from fleetgate.control.context import Control
from fleetgate.control.data_dir import DataDirUnusable, unusable_sentence, write_whole
from fleetgate.core.fault_injection import (
    Fault,
    InjectedFaults,
    SloObservation,
    decode_injected,
    encode_injected,
    violates_slo_bound,
)
from fleetgate.core.model import Gateway, Slo
from fleetgate.ipc.exposition import HistogramSeries, MetricSeries, read_series
from fleetgate.ipc.fault_file import FAULTS

LOOK_EVERY_S = 1.0
WINDOW_LOOKS = 10  # the SLO is judged over the last ten seconds of the fault
_WELL, _LOST = ("ok",), ("failed", "interrupted", "refused")
REQUESTS, STRIKES = "fleetgate_requests_total", "fleetgate_injected_faults_total"
TARGETS = (("fleetgate_ttft_seconds", "ttft_s"), ("fleetgate_tpot_seconds", "tpot_s"))

log = structlog.get_logger()


class FaultExists(Exception):
    """A fault of this name is in force."""


class FaultService:
    """The faults in force. The file is their only store, so that what is listed is what workers do."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._path: Path = control.data_dir.path / FAULTS
        self._faults: dict[str, Fault] = {fault.name: fault for fault in self._load()}
        self._seen: dict[str, deque[SloObservation]] = {}
        self._lock = threading.RLock()  # requests and the look once a second come from several threads

    def all(self) -> list[Fault]:
        """Those in force, in the order in which they began."""
        now_s = time.time()
        with self._lock:
            return [fault for fault in self._faults.values() if now_s < fault.ends_s]

    def begin(self, fault: Fault) -> None:
        """Put one in force.

        Raises: `FaultExists`; `DataDirUnusable` when the disk does not take it.
        """
        with self._lock:
            if fault.name in self._faults:
                raise FaultExists(fault.name)
            self._faults[fault.name] = fault
            try:
                self._write()
            except DataDirUnusable:
                del self._faults[fault.name]
                raise
        bound = f", or until under {fault.stop_below_slo:.0%} of requests are inside the SLO"
        self._tell(
            fault,
            f"Fault {fault.name} began: {fault.kind} for {fault.share:.0%} of the requests to Deployment "
            f"{fault.deployment}, for {fault.ends_s - fault.begins_s:.0f} s{bound if fault.stop_below_slo else ''}.",
        )

    def end(self, name: str, because: str) -> Fault | None:
        """Take one out of force, and say why; None where there is none. Raises: `DataDirUnusable`."""
        with self._lock:
            fault = self._faults.pop(name, None)
            if fault is None:
                return None
            self._seen.pop(name, None)
            self._write()
        self._tell(fault, f"Fault {name} ended: {because}. It struck {self.strikes(name)} requests.")
        return fault

    def strikes(self, name: str) -> int:
        """How many requests it has struck, in all workers."""
        return sum(self._series().counts_by(STRIKES, "fault", fault=name).values())

    async def run(self) -> None:
        """Look once a second whether one is over or does too much harm, and let workers know that somebody looks."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if self._faults:
                try:
                    await asyncio.to_thread(self._look)
                except DataDirUnusable as error:  # unwatched faults end by themselves
                    log.error("faults_not_watched", reason=str(error))

    def _look(self) -> None:
        now_s, series = time.time(), self._series()
        for fault in list(self._faults.values()):
            if now_s >= fault.ends_s:
                self.end(fault.name, f"its {fault.ends_s - fault.begins_s:.0f} s are over")
                continue
            seen = self._since_then(fault, series)
            if violates_slo_bound(fault, seen):
                share = f"{seen.share_inside:.1%} of {seen.succeeded + seen.failed} requests were inside the SLO"
                self.end(fault.name, f"{share}, under its bound of {fault.stop_below_slo:.0%}")
        with self._lock:
            if any(fault.stop_below_slo for fault in self._faults.values()):
                self._write()

    def _since_then(self, fault: Fault, series: MetricSeries) -> SloObservation:
        """What the Gateways that use its Deployment gave their clients in the last seconds."""
        snapshot = self._control.publisher.current
        gateways = [
            gateway
            for gateway in (snapshot.gateways if snapshot else ())
            if any(upstream.deployment == fault.deployment for upstream in gateway.upstreams)
        ]
        now = _sum([_seen(gateway, series) for gateway in gateways])
        looks = self._seen.setdefault(fault.name, deque(maxlen=WINDOW_LOOKS + 1))
        looks.append(now)
        then = looks[0]
        return SloObservation(
            max(0, now.succeeded - then.succeeded), max(0, now.late - then.late), max(0, now.failed - then.failed)
        )

    def _series(self) -> MetricSeries:
        board = self._control.board
        return read_series(board.series_totals() if board is not None else {})

    def _tell(self, fault: Fault, sentence: str) -> None:
        self._control.record("Deployment", fault.deployment, sentence)

    def _load(self) -> tuple[Fault, ...]:
        try:
            return decode_injected(self._path.read_bytes()).faults
        except FileNotFoundError:
            return ()
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("faults_unreadable", reason=str(error), meaning="none is in force")
            return ()

    def _write(self) -> None:
        try:
            write_whole(
                self._path, encode_injected(InjectedFaults(watched_s=time.time(), faults=tuple(self._faults.values())))
            )
        except OSError as error:
            raise DataDirUnusable(unusable_sentence(self._path.parent, error)) from error


def new_name(fault_kind: str) -> str:
    """A name for a fault that nobody named."""
    return f"{fault_kind}-{secrets.token_hex(3)}"


def _seen(gateway: Gateway, series: MetricSeries) -> SloObservation:
    outcomes = series.counts_by(REQUESTS, "outcome", gateway=gateway.name)
    slo = gateway.slo or Slo()
    late = max(
        _over(series.histogram(metric, gateway=gateway.name), getattr(slo, target)) for metric, target in TARGETS
    )
    return SloObservation(
        succeeded=sum(outcomes.get(outcome, 0) for outcome in _WELL),
        late=late,
        failed=sum(outcomes.get(outcome, 0) for outcome in _LOST),
    )


def _over(histogram: HistogramSeries, target_s: float) -> int:
    """Observations over a target, which counts as the next bound of a bucket: up to twice itself."""
    within = next((total for bound, total in histogram.cumulated() if bound >= target_s), 0)
    return histogram.count - within


def _sum(parts: list[SloObservation]) -> SloObservation:
    return SloObservation(
        sum(part.succeeded for part in parts), sum(part.late for part in parts), sum(part.failed for part in parts)
    )
