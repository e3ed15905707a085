"""The concurrency limit and the TPOT margin of a Deployment, corrected by the results of its requests."""

import msgspec

LATE_SHARE_MAX = 0.05
REFUSED_SHARE_MAX = 0.02
WINDOW_S = 10.0
BACK_OFF = 0.9
BACK_OFF_MIN = 0.5
BACK_OFF_EVERY_S = 2.0
RAISE_SHARE = 0.01
MARGIN_BACK_OFF = 0.98
MARGIN_RAISE = 0.002
MARGIN_MIN, MARGIN_MAX = 0.6, 1.3
MARGIN_FIRST = 1.2
WAITING_POLLS_MAX = 3
WAITING_SHARE_MAX = 0.05
REPORTED_SHARE = 0.1  # a rising limit is reported once for every tenth, a falling one always
KV_SHARE_MAX = 0.9


class ViolationCounts(msgspec.Struct, frozen=True):
    """The results of a Deployment's requests, as counters that only rise."""

    ended: int = 0
    ttft_late: int = 0
    tpot_late: int = 0
    refused: int = 0

    def minus(self, before: "ViolationCounts") -> "ViolationCounts":
        """The counts since an earlier one; a counter that fell, because its worker restarted, counts from zero."""
        return ViolationCounts(
            max(0, self.ended - before.ended),
            max(0, self.ttft_late - before.ttft_late),
            max(0, self.tpot_late - before.tpot_late),
            max(0, self.refused - before.refused),
        )


class EngineLoad(msgspec.Struct, frozen=True):
    """The load that an engine reports; None if it reports none or the report is old."""

    waiting: int | None = None
    kv_share: float | None = None


class LimitBounds(msgspec.Struct, frozen=True):
    """Where a limit starts, how far it may move, and whether an operator wrote it, so that it never rises above that.

    Units: `start` 0 means no limit until the engine refuses requests or lets them wait.
    """

    start: int
    least: int
    most: int
    written: bool = False


class LimitChange(msgspec.Struct, frozen=True):
    """A limit that changed. Shape: `because` is the reason as one sentence."""

    before: int
    after: int
    because: str


class AdaptiveLimit:
    """One Deployment's limit and TPOT margin: AIMD on violations, once a second, never while it is idle.

    An engine without a Profile has no limit until it refuses requests or lets them wait; then the limit starts at the
    requests in flight that it served.
    """

    __slots__ = (
        "_back_off_until_s",
        "_bounds",
        "_history",
        "_polls_waiting",
        "_reported",
        "_settled",
        "limit",
        "margin",
    )

    def __init__(self, bounds: LimitBounds) -> None:
        self._bounds = bounds
        self._history: list[tuple[float, ViolationCounts]] = []
        self._polls_waiting = 0
        self._settled = ViolationCounts()
        self._back_off_until_s = float("-inf")
        self.limit = float(bounds.start)
        self._reported = bounds.start
        self.margin = MARGIN_FIRST

    def update(self, counts: ViolationCounts, in_flight: int, signals: EngineLoad, now_s: float) -> LimitChange | None:
        """Correct the limit and the margin by the last ten seconds."""
        self._history.append((now_s, counts))
        while len(self._history) > 2 and self._history[1][0] <= now_s - WINDOW_S:
            self._history.pop(0)
        recent = counts.minus(self._history[0][1])
        # A few requests always wait for the current step to end; more than that wait for capacity.
        queues = (signals.waiting or 0) > WAITING_SHARE_MAX * in_flight
        self._polls_waiting = self._polls_waiting + 1 if queues else 0
        if now_s <= self._back_off_until_s:  # requests sent before the last step down have to end first
            self._settled, self._polls_waiting = counts, 0
        before = int(self.limit)
        self._correct_margin(recent, in_flight)
        violation = self._violation(recent, counts.minus(self._settled), signals)
        if violation:
            self._back_off(in_flight, signals.waiting if queues and signals.waiting else 0, now_s)
        elif in_flight > 0.5 * self.limit and not queues:
            self._raise()
        after = int(self.limit)
        is_small = before <= after < self._reported * (1.0 + REPORTED_SHARE) and after < self._bounds.most
        if after == self._reported or is_small:
            return None
        reported, self._reported = self._reported, after
        return LimitChange(reported, after, violation or "it was busy, and no request was late or refused")

    def _violation(self, recent: ViolationCounts, settled: ViolationCounts, signals: EngineLoad) -> str:
        """What is wrong, as a sentence, or nothing. Shape: `settled` counts since the last step down took effect."""
        ended, refused = min(recent.ended, settled.ended), min(recent.refused, settled.refused)
        if refused and refused > REFUSED_SHARE_MAX * (ended + refused):
            return f"the engine refused {refused} of the last {ended + refused} requests"
        if self._bounds.written:
            return ""
        ended, late = recent.ended, max(recent.ttft_late, recent.tpot_late)
        # With predictions the margin reacts first: it changes which requests are admitted, not how many.
        if ended and late > LATE_SHARE_MAX * ended and late > 1 and self.margin <= MARGIN_MIN:
            target = "TTFT" if recent.ttft_late >= recent.tpot_late else "TPOT"
            return f"{late} of the last {ended} responses missed their {target} target"
        if self._polls_waiting >= WAITING_POLLS_MAX:
            return f"the engine had requests waiting in {self._polls_waiting} polls in a row"
        if signals.kv_share is not None and signals.kv_share > KV_SHARE_MAX:
            return f"the engine's KV cache is {signals.kv_share:.0%} full"
        return ""

    def _back_off(self, in_flight: int, waiting: int, now_s: float) -> None:
        """A step down: to the requests that the engine runs if it reports how many wait, else by a tenth."""
        if now_s <= self._back_off_until_s:
            return
        self._back_off_until_s = now_s + BACK_OFF_EVERY_S
        running = float(max(in_flight - waiting, self._bounds.least))
        before = self.limit or running
        after = before * BACK_OFF
        if waiting and running > BACK_OFF_MIN * before:  # below that, the two were not read at the same time
            after = min(before - 1.0, running) if self.limit else running
        self.limit = max(float(self._bounds.least), after)

    def _raise(self) -> None:
        if self.limit:
            ceiling = float(self._bounds.start if self._bounds.written else self._bounds.most)
            self.limit = min(ceiling, self.limit + max(1.0, RAISE_SHARE * self.limit))

    def _correct_margin(self, recent: ViolationCounts, in_flight: int) -> None:
        late = max(recent.ttft_late, recent.tpot_late)
        if recent.ended and late > LATE_SHARE_MAX * recent.ended:
            self.margin = max(MARGIN_MIN, self.margin * MARGIN_BACK_OFF)
        elif in_flight > 0.25 * self.limit:
            self.margin = min(MARGIN_MAX, self.margin + MARGIN_RAISE)
