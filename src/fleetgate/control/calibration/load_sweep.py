"""A load sweep against one live Endpoint. It ends with its plan, at the engine's limit, or when it is cancelled."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import msgspec

from fleetgate.control.calibration.client import (
    CalibrationClient,
    EngineFull,
    MeasuredResponse,
    PromptTooLong,
    RequestFailed,
)
from fleetgate.core.capacity import calibration
from fleetgate.core.capacity.calibration import RequestWave, SingleRequest, SweepBudget, SweepRound, SweepTargets
from fleetgate.protocols.engines import EngineSignals

POLL_EVERY_S = 0.1
QUEUED_POLLS = 3
DRAIN_S_MAX = 2.0  # a metrics page may be a second old; requests that run after two seconds are not of the sweep
TrafficCheck = Callable[[], int]  # the client requests in flight to the Deployment


class TrafficDetected(Exception):
    """The Deployment received requests that are not part of the sweep."""


class SweepProgress(msgspec.Struct):
    """The progress of a sweep. Units: `share` of the planned tokens, 0 to 1."""

    step: str = "waiting to begin"
    requests: int = 0
    tokens: int = 0
    share: float = 0.0


class SweepFindings(msgspec.Struct, frozen=True):
    """The result of a sweep. Shape: `estimated` is true if the engine reported no token counts."""

    measured: calibration.MeasuredProfile
    kv_tokens: int
    because: str
    estimated: bool


class LoadSweep:
    """One sweep. Shape: `traffic` is called ten times a second; None turns the check off."""

    def __init__(
        self,
        client: CalibrationClient,
        engines: int,
        targets: SweepTargets,
        budget: SweepBudget,
        traffic: TrafficCheck | None,
    ) -> None:
        self._client = client
        self._engines = engines
        self._targets = targets
        self._budget = budget
        self._traffic = traffic
        self._singles: list[SingleRequest] = []
        self._waves: list[RequestWave] = []
        self._estimated = False
        self._too_long_tokens = 0  # the length of the first prompt that was too long, 0 before
        self.progress = SweepProgress()

    async def run(self, rounds: Sequence[SweepRound]) -> SweepFindings:
        """Send the rounds one after another and return the findings.

        Raises: `RequestFailed`, `TrafficDetected`, `MeasurementFailed`.
        """
        planned = sum(one.tokens for one in rounds)
        because = "the budget was used up"
        passed = 0
        for one in rounds:
            reason = calibration.stop_reason(self._waves, self._targets)
            if reason:
                because = reason
                break
            if not self._fits_budget(one):
                break
            self.progress.step = _step(one)
            await self._round(one)
            passed += one.tokens
            self.progress.share = passed / planned
        else:
            because = calibration.stop_reason(self._waves, self._targets) or because
        measured = calibration.measured_profile(self._singles, self._waves, self._targets)
        kv_tokens = await self._client.kv_tokens()
        self.progress.step, self.progress.share = "done", 1.0
        return SweepFindings(measured, kv_tokens, because, self._estimated)

    def _fits_budget(self, one: SweepRound) -> bool:
        """Whether a round fits into the rest of the budget, given the actual token counts so far."""
        budget, progress = self._budget, self.progress
        return (
            progress.requests + one.concurrency <= budget.requests_max
            and progress.tokens + one.tokens <= budget.tokens_max
        )

    async def _round(self, one: SweepRound) -> None:
        if self._too_long_tokens and one.prompt_tokens >= self._too_long_tokens:
            return
        load = _ObservedLoad()
        results = await self._send(one, load)
        responses = list(self._complete(one, results))
        match one.measures:
            case "prefill" if responses:
                self._singles.append(SingleRequest(responses[0].uncached_tokens, responses[0].ttft_s))
            case "decode":
                self._waves.append(self._wave(one.concurrency, responses, load))
        await self._drain()

    async def _send(self, one: SweepRound, load: "_ObservedLoad") -> list[MeasuredResponse | BaseException]:
        """Send all requests of a round at once; meanwhile poll the engine's load and the clients' traffic."""
        self.progress.requests += one.concurrency
        requests = (self._client.send(one.prompt_tokens, one.output_tokens) for _ in range(one.concurrency))
        responses = asyncio.gather(*requests, return_exceptions=True)
        poller = asyncio.create_task(self._poll(load))
        either: list[asyncio.Future[Any]] = [responses, poller]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if poller.done():
                poller.result()  # it ends only with an exception
            return await responses
        finally:
            responses.cancel()
            poller.cancel()
            await asyncio.gather(responses, poller, return_exceptions=True)

    def _complete(
        self, one: SweepRound, results: Sequence[MeasuredResponse | BaseException]
    ) -> Iterator[MeasuredResponse]:
        """The complete responses of a round. Raises: `RequestFailed` if the sweep cannot continue."""
        for result in results:
            match result:
                case MeasuredResponse() as response:
                    self._estimated = self._estimated or not response.counted
                    self.progress.tokens += response.uncached_tokens + response.output_tokens
                    yield response
                case EngineFull() as full:
                    if one.measures != "decode" or one.concurrency <= self._engines:
                        raise RequestFailed(f"the engine is already full ({full}); wait until it is idle") from full
                case PromptTooLong() as refusal:
                    if one.measures != "prefill" or not self._singles:
                        raise RequestFailed(f"the engine refused the request ({refusal}); look at its log") from refusal
                    self._too_long_tokens = one.prompt_tokens
                case BaseException() as failure:
                    raise failure

    def _wave(self, at_once: int, responses: Sequence[MeasuredResponse], load: "_ObservedLoad") -> RequestWave:
        """The share of a round of one engine behind the Endpoint, if the engines share the round evenly."""
        if not responses:
            raise RequestFailed(f"the engine refused all of {at_once} requests at once; look at its log")
        streams = [response.events_s for response in responses]
        sent_s = min(response.sent_s for response in responses)
        prompts = sum(response.uncached_tokens for response in responses)
        output = sum(response.output_tokens for response in responses)
        prefill_s = prompts / calibration.fit_prefill(self._singles) / self._engines
        begun = calibration.concurrent_streams(streams, sent_s, prefill_s)
        return RequestWave(
            batch=at_once / self._engines,
            step_s=calibration.decode_step_s(streams, output / sum(map(len, streams))),
            wave_s=max(response.ended_s for response in responses) - sent_s,
            prompt_tokens=prompts / len(responses),
            output_tokens=output / len(responses),
            ttft_s=median(response.ttft_s for response in responses),
            queued=load.queued or begun < len(streams),
            refused=-(-(at_once - len(responses)) // self._engines),
            running=(load.running or begun) / self._engines,
        )

    async def _poll(self, load: "_ObservedLoad") -> None:
        """Poll traffic and load until cancelled. Raises: `TrafficDetected`."""
        while True:
            self._check_traffic()
            signals = await self._client.load()
            if signals is not None:
                load.add(signals)
            await asyncio.sleep(POLL_EVERY_S)

    async def _drain(self) -> None:
        """Wait until the engine is idle again. Raises: `TrafficDetected` if other requests keep it busy."""
        self._check_traffic()
        if self._traffic is None:
            return
        try:
            async with asyncio.timeout(DRAIN_S_MAX):
                while not await self._idle():  # noqa: ASYNC110 - an engine sends no notification
                    await asyncio.sleep(POLL_EVERY_S)
        except TimeoutError:
            raise TrafficDetected("the engine serves requests that are not part of the calibration") from None

    async def _idle(self) -> bool:
        """Whether the engine reports no request, or reports nothing."""
        signals = await self._client.load()
        return signals is None or not (signals.running or signals.waiting)

    def _check_traffic(self) -> None:
        count = self._traffic() if self._traffic is not None else 0
        if count:
            raise TrafficDetected(f"{count} client request{'s' if count > 1 else ''} arrived during the sweep")


class _ObservedLoad(msgspec.Struct):
    """The load that the engine reported during a round."""

    running: int = 0
    queued: bool = False
    _last: tuple[int, int] = (0, 0)
    _same_polls: int = 0

    def add(self, signals: EngineSignals) -> None:
        """Add one poll. Requests that only wait for their prefill do not count as queued, since `running` grows."""
        running, waiting = signals.running or 0, signals.waiting or 0
        self.running = max(self.running, running)
        self._same_polls = self._same_polls + 1 if waiting and (running, waiting) == self._last else 0
        self._last = (running, waiting)
        self.queued = self.queued or self._same_polls >= QUEUED_POLLS


def _step(one: SweepRound) -> str:
    match one.measures:
        case "decode":
            return f"{one.concurrency} request{'s' if one.concurrency > 1 else ''} at once"
        case "prefill":
            return f"a prompt of {one.prompt_tokens:,} tokens"
        case _:
            return "warming up"
