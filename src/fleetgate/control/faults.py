"""Injected faults: this service starts and ends them in a file; the workers read the file and apply them."""

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

POLL_EVERY_S = 1.0
WINDOW_POLLS = 10  # the SLO is measured over the last ten seconds of the fault
_WELL, _LOST = ("ok",), ("failed", "interrupted", "refused")
REQUESTS, INJECTED = "fleetgate_requests_total", "fleetgate_injected_faults_total"
TARGETS = (("fleetgate_ttft_seconds", "ttft_s"), ("fleetgate_tpot_seconds", "tpot_s"))

log = structlog.get_logger()


class FaultExists(Exception):
    """A fault of this name is active."""


class FaultService:
    """The active faults. The file is their only store, so the list always agrees with what workers apply."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._path: Path = control.data_dir.path / FAULTS
        self._faults: dict[str, Fault] = {fault.name: fault for fault in self._load()}
        self._observations: dict[str, deque[SloObservation]] = {}
        self._lock = threading.RLock()  # API requests and the poll run in different threads

    def all(self) -> list[Fault]:
        """The active faults, oldest first."""
        now_s = time.time()
        with self._lock:
            return [fault for fault in self._faults.values() if now_s < fault.ends_s]

    def begin(self, fault: Fault) -> None:
        """Start a fault.

        Raises: `FaultExists`; `DataDirUnusable` if the file cannot be written.
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
        limit = f", or until fewer than {fault.stop_below_slo:.0%} of requests are inside the SLO"
        self._record(
            fault,
            f"Fault {fault.name} began: {fault.kind} for {fault.share:.0%} of the requests to Deployment "
            f"{fault.deployment}, for {fault.ends_s - fault.begins_s:.0f} s{limit if fault.stop_below_slo else ''}.",
        )

    def end(self, name: str, because: str) -> Fault | None:
        """End a fault and record the reason. The result is None if it is not active. Raises: `DataDirUnusable`."""
        with self._lock:
            fault = self._faults.pop(name, None)
            if fault is None:
                return None
            self._observations.pop(name, None)
            self._write()
        self._record(fault, f"Fault {name} ended: {because}. It affected {self.struck_requests(name)} requests.")
        return fault

    def struck_requests(self, name: str) -> int:
        """The number of requests that a fault has affected in all workers."""
        return sum(self._series().counts_by(INJECTED, "fault", fault=name).values())

    async def run(self) -> None:
        """Once a second, end faults that are over or harm too much, and refresh the file for the workers."""
        while True:
            await asyncio.sleep(POLL_EVERY_S)
            if self._faults:
                try:
                    await asyncio.to_thread(self._poll)
                except DataDirUnusable as error:  # workers end faults with an SLO limit if the file gets stale
                    log.error("faults_not_watched", reason=str(error))

    def _poll(self) -> None:
        now_s, series = time.time(), self._series()
        for fault in list(self._faults.values()):
            if now_s >= fault.ends_s:
                self.end(fault.name, f"its {fault.ends_s - fault.begins_s:.0f} s are over")
                continue
            observed = self._observe(fault, series)
            if violates_slo_bound(fault, observed):
                share = f"{observed.share_inside:.1%} of {observed.succeeded + observed.failed} requests met the SLO"
                self.end(fault.name, f"{share}, below its limit of {fault.stop_below_slo:.0%}")
        with self._lock:
            if any(fault.stop_below_slo for fault in self._faults.values()):
                self._write()

    def _observe(self, fault: Fault, series: MetricSeries) -> SloObservation:
        """The requests of the Gateways that use the fault's Deployment, in the last `WINDOW_POLLS` seconds."""
        snapshot = self._control.publisher.current
        gateways = [
            gateway
            for gateway in (snapshot.gateways if snapshot else ())
            if any(upstream.deployment == fault.deployment for upstream in gateway.upstreams)
        ]
        now = _sum([_totals(gateway, series) for gateway in gateways])
        window = self._observations.setdefault(fault.name, deque(maxlen=WINDOW_POLLS + 1))
        window.append(now)
        first = window[0]
        return SloObservation(
            max(0, now.succeeded - first.succeeded), max(0, now.late - first.late), max(0, now.failed - first.failed)
        )

    def _series(self) -> MetricSeries:
        shared_memory = self._control.shared_memory
        return read_series(shared_memory.series_totals() if shared_memory is not None else {})

    def _record(self, fault: Fault, sentence: str) -> None:
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
    """A name for a fault that was started without one."""
    return f"{fault_kind}-{secrets.token_hex(3)}"


def _totals(gateway: Gateway, series: MetricSeries) -> SloObservation:
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
    """The number of observations over a target. The target is rounded up to the next bucket bound, at most doubled."""
    within = next((total for bound, total in histogram.cumulated() if bound >= target_s), 0)
    return histogram.count - within


def _sum(parts: list[SloObservation]) -> SloObservation:
    return SloObservation(
        sum(part.succeeded for part in parts), sum(part.late for part in parts), sum(part.failed for part in parts)
    )
