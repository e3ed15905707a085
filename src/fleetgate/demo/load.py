"""Load for the tour: a few clients, each of which sends one request after another through the official SDK."""

import threading
import time
from collections.abc import Callable, Sequence

import msgspec
import openai

from fleetgate.demo.fleet import MODEL, DemoFleet

REQUEST_S_MAX = 60.0
# A client's pause between requests. The engine frees a slot a moment after the client has read the last event of the
# response; without the pause, the client's next request could find the slot of its last one still taken.
THINK_S = 0.05
_PROMPTS = ("Name a color.", "Name a fruit.", "Name a city.", "Name an animal.", "Name a river.", "Name a tool.")


class DemoRequest(msgspec.Struct, kw_only=True):
    """One request and its result. Units: `started_s` on the monotonic clock; `ttft_s` to the first content."""

    started_s: float
    streamed: bool
    region: str = ""
    attempts: int = 0
    ttft_s: float = 0.0
    error: str = ""


def sdk(fleet: DemoFleet) -> openai.OpenAI:
    """Return a client of the official SDK without retries, because they would hide failures from the tour."""
    return openai.OpenAI(base_url=fleet.endpoint, api_key=fleet.key, max_retries=0, timeout=REQUEST_S_MAX)


def send_request(client: openai.OpenAI, number: int, streamed: bool, tokens: int) -> DemoRequest:
    """Send one request and read its response to the end."""
    request = DemoRequest(started_s=time.monotonic(), streamed=streamed)
    try:
        if streamed:
            _read_stream(client, number, tokens, request)
        else:
            _read_response(client, number, tokens, request)
    except openai.OpenAIError as error:
        request.error = f"{type(error).__name__}: {error}"
    return request


def _message(number: int) -> str:
    return f"{_PROMPTS[number % len(_PROMPTS)]} ({number})"


def _read_response(client: openai.OpenAI, number: int, tokens: int, request: DemoRequest) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=[{"role": "user", "content": _message(number)}], max_tokens=tokens
    )
    response = raw.parse()
    request.ttft_s = time.monotonic() - request.started_s
    _read_headers(raw.headers, request)
    if not response.choices or response.choices[0].finish_reason is None:
        request.error = "the response has no finish_reason"


def _read_stream(client: openai.OpenAI, number: int, tokens: int, request: DemoRequest) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": _message(number)}],
        max_tokens=tokens,
        temperature=0,  # a stream with temperature 0 can be resumed at another engine
        stream=True,
    )
    _read_headers(raw.headers, request)
    finish_reason = None
    with raw.parse() as stream:
        for chunk in stream:
            for choice in chunk.choices:
                if choice.delta.content and not request.ttft_s:
                    request.ttft_s = time.monotonic() - request.started_s
                finish_reason = choice.finish_reason or finish_reason
    if finish_reason is None:
        request.error = "the stream ended without a finish_reason and without an error"


def _read_headers(headers: object, request: DemoRequest) -> None:
    get: Callable[[str, str], str] = getattr(headers, "get")  # noqa: B009 - the SDK's header type has no stub
    request.region = get("x-fleetgate-region", "")
    request.attempts = int(get("x-fleetgate-attempts", "0"))


class DemoLoad:
    """A number of parallel clients, from `start` to `stop`.

    Shape: every `streamed_every`-th request is streamed, 0 for none.
    """

    def __init__(self, fleet: DemoFleet, clients: int, tokens: int, streamed_every: int) -> None:
        self.streamed_every = streamed_every
        self._fleet = fleet
        self._tokens = tokens
        self._lock = threading.Lock()
        self._requests: list[DemoRequest] = []
        self._number = 0
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._client, daemon=True) for _ in range(clients)]

    def start(self) -> None:
        """Start the clients."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> list[DemoRequest]:
        """Let running requests end, and return all requests."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        return self._requests

    def finished(self) -> Sequence[DemoRequest]:
        """Return the requests that have ended so far."""
        with self._lock:
            return tuple(self._requests)

    def wait(self, enough: Callable[[Sequence[DemoRequest]], bool], limit_s: float) -> bool:
        """Wait until `enough` accepts the finished requests; return False after `limit_s`."""
        end_s = time.monotonic() + limit_s
        while not enough(self.finished()):
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
                request = send_request(client, number, bool(every) and number % every == 0, self._tokens)
                with self._lock:
                    self._requests.append(request)
                self._stopping.wait(THINK_S)


class LongStream(threading.Thread):
    """One long stream, which still runs when its region dies."""

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
        """Read the stream to its end, or to its error."""
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
            extra_body={"ignore_eos": True},  # the stream must still run when its region dies
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
    def is_complete(self) -> bool:
        """Whether it ended with a finish_reason."""
        return not self.error and self.finish_reason is not None


def quantile_s(values: Sequence[float], share: float) -> float:
    """Return a quantile by nearest rank; 0 without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
