"""Load for the tour: a few clients that each send one request after the other through the official SDK."""

import threading
import time
from collections.abc import Callable, Sequence

import msgspec
import openai

from fleetgate.demo.fleet import MODEL, DemoFleet

REQUEST_S_MAX = 60.0
# Between an answer and a client's next request. A slot is free when the engine has closed its answer, a moment after
# the client has seen the end of it; without the pause a client's next request could meet its own last one.
THINK_S = 0.05
_PROMPTS = ("Name a color.", "Name a fruit.", "Name a city.", "Name an animal.", "Name a river.", "Name a tool.")


class DemoRequest(msgspec.Struct, kw_only=True):
    """One request and what came of it. Units: `started_s` on the monotonic clock; `ttft_s` to the first content."""

    started_s: float
    streamed: bool
    region: str = ""
    attempts: int = 0
    ttft_s: float = 0.0
    error: str = ""


def sdk(fleet: DemoFleet) -> openai.OpenAI:
    """The official SDK on the one endpoint, with its own retries off: they would hide failures from the tour."""
    return openai.OpenAI(base_url=fleet.endpoint, api_key=fleet.key, max_retries=0, timeout=REQUEST_S_MAX)


def shoot(client: openai.OpenAI, number: int, streamed: bool, tokens: int) -> DemoRequest:
    """Send one request and read its answer to the end."""
    shot = DemoRequest(started_s=time.monotonic(), streamed=streamed)
    try:
        if streamed:
            _stream(client, number, tokens, shot)
        else:
            _whole(client, number, tokens, shot)
    except openai.OpenAIError as error:
        shot.error = f"{type(error).__name__}: {error}"
    return shot


def _message(number: int) -> str:
    return f"{_PROMPTS[number % len(_PROMPTS)]} ({number})"


def _whole(client: openai.OpenAI, number: int, tokens: int, shot: DemoRequest) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=[{"role": "user", "content": _message(number)}], max_tokens=tokens
    )
    answer = raw.parse()
    shot.ttft_s = time.monotonic() - shot.started_s
    _place(raw.headers, shot)
    if not answer.choices or answer.choices[0].finish_reason is None:
        shot.error = "the answer has no finish_reason"


def _stream(client: openai.OpenAI, number: int, tokens: int, shot: DemoRequest) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": _message(number)}],
        max_tokens=tokens,
        temperature=0,  # such a stream goes on elsewhere when it breaks off
        stream=True,
    )
    _place(raw.headers, shot)
    finish_reason = None
    with raw.parse() as stream:
        for chunk in stream:
            for choice in chunk.choices:
                if choice.delta.content and not shot.ttft_s:
                    shot.ttft_s = time.monotonic() - shot.started_s
                finish_reason = choice.finish_reason or finish_reason
    if finish_reason is None:
        shot.error = "the stream ended without a finish_reason and without an error"


def _place(headers: object, shot: DemoRequest) -> None:
    get: Callable[[str, str], str] = getattr(headers, "get")  # noqa: B009 - the SDK's own header type has no stub
    shot.region = get("x-fleetgate-region", "")
    shot.attempts = int(get("x-fleetgate-attempts", "0"))


class DemoLoad:
    """So many clients at once, from `start` to `stop`.

    Shape: every `streamed_every`-th request is streamed, 0 for none.
    """

    def __init__(self, fleet: DemoFleet, clients: int, tokens: int, streamed_every: int) -> None:
        self.streamed_every = streamed_every
        self._fleet = fleet
        self._tokens = tokens
        self._lock = threading.Lock()
        self._shots: list[DemoRequest] = []
        self._number = 0
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._client, daemon=True) for _ in range(clients)]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> list[DemoRequest]:
        """Let what runs end, and give all shots."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        return self._shots

    def done(self) -> Sequence[DemoRequest]:
        """The shots that have ended so far."""
        with self._lock:
            return tuple(self._shots)

    def wait(self, enough: Callable[[Sequence[DemoRequest]], bool], limit_s: float) -> bool:
        """Wait until the shots so far are enough; False when they are not in time."""
        end_s = time.monotonic() + limit_s
        while not enough(self.done()):
            if time.monotonic() > end_s:
                return False
            time.sleep(0.05)
        return True

    def _client(self) -> None:
        with sdk(self._fleet) as client:
            while not self._stopping.is_set():
                with self._lock:
                    number = self._number = self._number + 1
                every = self.streamed_every
                shot = shoot(client, number, bool(every) and number % every == 0, self._tokens)
                with self._lock:
                    self._shots.append(shot)
                self._stopping.wait(THINK_S)


class LoadSummary(threading.Thread):
    """One long stream, to be half-way out when its region dies."""

    def __init__(self, fleet: DemoFleet, tokens: int) -> None:
        super().__init__(daemon=True)
        self._fleet = fleet
        self._tokens = tokens
        self.begun = threading.Event()
        self.region = ""
        self.events = 0
        self.text = ""
        self.finish_reason: str | None = None
        self.error = ""

    def run(self) -> None:
        """Read the stream to whatever its end is."""
        try:
            with sdk(self._fleet) as client:
                self._read(client)
        except openai.OpenAIError as error:
            self.error = str(error)
        finally:
            self.begun.set()

    def _read(self, client: openai.OpenAI) -> None:
        raw = client.chat.completions.with_raw_response.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Tell a very long story about a lighthouse."}],
            max_tokens=self._tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},  # the engine must not end it before the tour does
        )
        self.region = raw.headers.get("x-fleetgate-region", "")
        with raw.parse() as stream:
            for chunk in stream:
                for choice in chunk.choices:
                    self.events += bool(choice.delta.content)
                    self.text += choice.delta.content or ""
                    self.finish_reason = choice.finish_reason or self.finish_reason
                if self.events >= 3:
                    self.begun.set()

    @property
    def whole(self) -> bool:
        """Whether it came to its end."""
        return not self.error and self.finish_reason is not None


def quantile_s(values: Sequence[float], share: float) -> float:
    """The value below which a share of the values lies, by nearest rank; 0 for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
