"""A sweep against one live Endpoint: it sends what the plan says, until the plan, the engine or somebody ends it."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import msgspec

from fleetgate.control.calibration.client import (
    CalibrationClient,
    EngineFull,
    MeasuredAnswer,
    PromptTooLong,
    RequestFailed,
)
from fleetgate.core.capacity import calibration
from fleetgate.core.capacity.calibration import RequestWave, SingleRequest, SweepBudget, SweepRound, SweepTargets
from fleetgate.protocols.engines import EngineSignals

LOOK_EVERY_S = 0.1
QUEUED_LOOKS = 3
DRAIN_S_MAX = 2.0  # a metrics page may be a second old; after two, what still runs is not ours
TrafficCheck = Callable[[], int]  # requests of clients that are in flight to the Deployment


class TrafficWatch(Exception):
    """Clients' requests came in between."""


class SweepProgress(msgspec.Struct):
    """How far a sweep is. Units: `share` 0 to 1, of the tokens planned."""

    step: str = "waiting to begin"
    requests: int = 0
    tokens: int = 0
    share: float = 0.0


class SweepFindings(msgspec.Struct, frozen=True):
    """What a sweep found. Shape: `estimated` says that the engine told no token counts."""

    measured: calibration.MeasuredProfile
    kv_tokens: int
    because: str
    estimated: bool


class LoadSweep:
    """One run. Shape: `traffic` is asked ten times a second, or never where it is None."""

    def __init__(
        self,
        asker: CalibrationClient,
        engines: int,
        targets: SweepTargets,
        budget: SweepBudget,
        traffic: TrafficCheck | None,
    ) -> None:
        self._asker = asker
        self._engines = engines
        self._targets = targets
        self._budget = budget
        self._traffic = traffic
        self._singles: list[SingleRequest] = []
        self._waves: list[RequestWave] = []
        self._estimated = False
        self._longest_tokens = 0  # 0 while no prompt was too long
        self.progress = SweepProgress()

    async def run(self, rounds: Sequence[SweepRound]) -> SweepFindings:
        """Send round after round, and say what they told.

        Raises: `RequestFailed`, `TrafficWatch`, `CannotTell`.
        """
        planned = sum(one.tokens for one in rounds)
        because = "all that its budget allows was sent"
        passed = 0
        for one in rounds:
            reason = calibration.stop_reason(self._waves, self._targets)
            if reason:
                because = reason
                break
            if not self._affordable(one):
                break
            self.progress.step = _step(one)
            await self._round(one)
            passed += one.tokens
            self.progress.share = passed / planned
        else:
            because = calibration.stop_reason(self._waves, self._targets) or because
        measured = calibration.measured_profile(self._singles, self._waves, self._targets)
        kv_tokens = await self._asker.kv_tokens()
        self.progress.step, self.progress.share = "done", 1.0
        return SweepFindings(measured, kv_tokens, because, self._estimated)

    def _affordable(self, one: SweepRound) -> bool:
        """Whether a round still fits, now that the answers' true token counts are known."""
        budget, progress = self._budget, self.progress
        return (
            progress.requests + one.concurrency <= budget.requests_max
            and progress.tokens + one.tokens <= budget.tokens_max
        )

    async def _round(self, one: SweepRound) -> None:
        if self._longest_tokens and one.prompt_tokens >= self._longest_tokens:
            return
        seen = _Seen()
        results = await self._send(one, seen)
        answers = list(self._whole(one, results))
        match one.measures:
            case "prefill" if answers:
                self._singles.append(SingleRequest(answers[0].uncached_tokens, answers[0].ttft_s))
            case "decode":
                self._waves.append(self._wave(one.concurrency, answers, seen))
        await self._drained()

    async def _send(self, one: SweepRound, seen: "_Seen") -> list[MeasuredAnswer | BaseException]:
        """All requests of a round at once, with an eye on the engine and on clients' traffic meanwhile."""
        self.progress.requests += one.concurrency
        asks = (self._asker.ask(one.prompt_tokens, one.output_tokens) for _ in range(one.concurrency))
        asked = asyncio.gather(*asks, return_exceptions=True)
        looker = asyncio.create_task(self._look(seen))
        either: list[asyncio.Future[Any]] = [asked, looker]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if looker.done():
                looker.result()  # it only ends to raise
            return await asked
        finally:
            asked.cancel()
            looker.cancel()
            await asyncio.gather(asked, looker, return_exceptions=True)

    def _whole(self, one: SweepRound, results: Sequence[MeasuredAnswer | BaseException]) -> Iterator[MeasuredAnswer]:
        """The answers of a round. Raises: `RequestFailed` for what a sweep cannot go on from."""
        for result in results:
            match result:
                case MeasuredAnswer() as answer:
                    self._estimated = self._estimated or not answer.counted
                    self.progress.tokens += answer.uncached_tokens + answer.output_tokens
                    yield answer
                case EngineFull() as full:
                    if one.measures != "decode" or one.concurrency <= self._engines:
                        raise RequestFailed(f"the engine is full already ({full}); wait until it is idle") from full
                case PromptTooLong() as refusal:
                    if one.measures != "prefill" or not self._singles:
                        raise RequestFailed(f"the engine refuses the request ({refusal}); look at its log") from refusal
                    self._longest_tokens = one.prompt_tokens
                case BaseException() as failure:
                    raise failure

    def _wave(self, at_once: int, answers: Sequence[MeasuredAnswer], seen: "_Seen") -> RequestWave:
        """What a round was for one of the engines behind the Endpoint, if they share it evenly."""
        if not answers:
            raise RequestFailed(f"the engine refused all of {at_once} requests at once; look at its log")
        streams = [answer.moments for answer in answers]
        sent_s = min(answer.sent_s for answer in answers)
        prompts = sum(answer.uncached_tokens for answer in answers)
        output = sum(answer.output_tokens for answer in answers)
        prefill_s = prompts / calibration.fit_prefill(self._singles) / self._engines
        begun = calibration.concurrent_streams(streams, sent_s, prefill_s)
        return RequestWave(
            batch=at_once / self._engines,
            step_s=calibration.decode_step_s(streams, output / sum(map(len, streams))),
            wave_s=max(answer.ended_s for answer in answers) - sent_s,
            prompt_tokens=prompts / len(answers),
            output_tokens=output / len(answers),
            ttft_s=median(answer.ttft_s for answer in answers),
            queued=seen.queued or begun < len(streams),
            refused=-(-(at_once - len(answers)) // self._engines),
            running=(seen.running or begun) / self._engines,
        )

    async def _look(self, seen: "_Seen") -> None:
        """Watch until cancelled. Raises: `TrafficWatch`."""
        while True:
            self._mind_traffic()
            signals = await self._asker.load()
            if signals is not None:
                seen.look(signals)
            await asyncio.sleep(LOOK_EVERY_S)

    async def _drained(self) -> None:
        """Wait until the engine is idle again. Raises: `TrafficWatch` where somebody else keeps it busy."""
        self._mind_traffic()
        if self._traffic is None:
            return
        try:
            async with asyncio.timeout(DRAIN_S_MAX):
                while not await self._idle():  # noqa: ASYNC110 - nothing rings when an engine is idle
                    await asyncio.sleep(LOOK_EVERY_S)
        except TimeoutError:
            raise TrafficWatch("the engine serves requests that did not come from here") from None

    async def _idle(self) -> bool:
        """Whether the engine has nothing to do, as far as it says."""
        signals = await self._asker.load()
        return signals is None or not (signals.running or signals.waiting)

    def _mind_traffic(self) -> None:
        count = self._traffic() if self._traffic is not None else 0
        if count:
            raise TrafficWatch(f"{count} request{'s' if count > 1 else ''} of clients came meanwhile")


class _Seen(msgspec.Struct):
    """What the engine said of itself during a round."""

    running: int = 0
    queued: bool = False
    _last: tuple[int, int] = (0, 0)
    _same_looks: int = 0

    def look(self, signals: EngineSignals) -> None:
        """Take in one look. Requests also wait for their turn to prefill, but then more and more are running."""
        running, waiting = signals.running or 0, signals.waiting or 0
        self.running = max(self.running, running)
        self._same_looks = self._same_looks + 1 if waiting and (running, waiting) == self._last else 0
        self._last = (running, waiting)
        self.queued = self.queued or self._same_looks >= QUEUED_LOOKS


def _step(one: SweepRound) -> str:
    match one.measures:
        case "decode":
            return f"{one.concurrency} request{'s' if one.concurrency > 1 else ''} at once"
        case "prefill":
            return f"a prompt of {one.prompt_tokens:,} tokens"
        case _:
            return "warming up"
