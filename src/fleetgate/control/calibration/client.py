"""A client of one Endpoint: it times each event of streamed chat completions and reads the engine's load."""

import asyncio
import contextlib
import random
import re
import ssl
import time
from collections.abc import AsyncIterator, Sequence

import httpx2
import msgspec

from fleetgate.control.resources import egress
from fleetgate.control.resources.field_types import Url
from fleetgate.core.model import Endpoint
from fleetgate.protocols import engines, sse
from fleetgate.protocols.clients import openai
from fleetgate.protocols.messages import EventMeaning

CONNECT_S_MAX = 5.0
LOAD_S_MAX = 2.0
RESPONSE_S_MAX = 180.0  # a response of a hundred tokens that takes longer is too slow to serve clients
ERROR_BYTES_MAX = 4096
FULL_STATUSES = frozenset({429, 503, 529})
# These engines accept `ignore_eos`, so that every response has the requested length.
_IGNORE_EOS_ENGINES = frozenset({"vllm", "sglang", "llamacpp", "tensorrt-llm"})
_WORDS_PER_TOKEN_FIRST = 0.7
_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work night point home water room mother area money story "
    "fact month lot right study book eye job word business issue side kind head house service friend father power "
    "hour game line end member law car city name team minute idea body back parent face level office door health"
)
_WORDS = tuple(_TEXT.split())
_CACHE_CONFIG = re.compile(rb"\nvllm:cache_config_info\{([^}\n]*)\}")


class RequestFailed(Exception):
    """A request of the calibration failed; the text is a sentence with the reason and the fix."""


class PromptTooLong(Exception):
    """The Endpoint refuses a prompt of this length."""


class EngineFull(Exception):
    """The Endpoint accepts no more requests now."""


class MeasuredResponse(msgspec.Struct, frozen=True):
    """A complete response.

    Units: `sent_s`, `events_s` and `ended_s` in seconds of the machine's monotonic clock.
    Shape: `counted` is true if the engine reported the token counts, otherwise they are estimates.
    """

    sent_s: float
    events_s: tuple[float, ...]
    ended_s: float
    uncached_tokens: int
    output_tokens: int
    counted: bool

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.events_s[0] - self.sent_s


class CalibrationTarget(msgspec.Struct, frozen=True):
    """The Endpoint to calibrate.

    Shape: `credential` is sent as a bearer token, empty for none; `ranges` is None for a trusted Endpoint.
    """

    endpoint: Endpoint
    engine: str
    upstream_model: str
    credential: str = ""
    ranges: Sequence[egress.IpNetwork] | None = ()


class _Details(msgspec.Struct):
    cached_tokens: int | None = 0


class _Usage(msgspec.Struct):
    prompt_tokens_details: _Details | None = None


class _UsageEvent(msgspec.Struct):
    usage: _Usage | None = None


_decode_usage = msgspec.json.Decoder(_UsageEvent).decode


class CalibrationClient:
    """A client of one Endpoint."""

    def __init__(self, target: CalibrationTarget, address: str) -> None:
        endpoint = target.endpoint
        host = f"[{address}]" if ":" in address else address
        named = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        headers = {"host": f"{named}:{endpoint.port}", "user-agent": "fleetgate-calibrate"}
        if target.credential:
            headers["authorization"] = f"Bearer {target.credential}"
        self._target = target
        self._root = f"{endpoint.scheme}://{host}:{endpoint.port}"
        # Connect to the checked address; certificate and Host are those of the name.
        self._extensions = {"sni_hostname": endpoint.host} if endpoint.scheme == "https" else {}
        self._http = httpx2.AsyncClient(
            headers={**headers, "accept-encoding": "identity"},
            timeout=httpx2.Timeout(RESPONSE_S_MAX, connect=CONNECT_S_MAX),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
            verify=ssl.create_default_context(),
            trust_env=False,
        )
        self._random = random.Random(time.time_ns())  # for prompts that are in no prefix cache, not for secrets
        self._words_per_token = _WORDS_PER_TOKEN_FIRST
        self._length_field = "max_tokens"

    async def send(self, prompt_tokens: int, output_tokens: int) -> MeasuredResponse:
        """Send a new prompt of about `prompt_tokens` and read the complete response.

        Raises: `EngineFull`, `PromptTooLong`, `RequestFailed`.
        """
        words = max(1, int(prompt_tokens * self._words_per_token))
        prompt = self._prompt(words)
        try:
            async with asyncio.timeout(RESPONSE_S_MAX):
                response = await self._send(prompt, output_tokens)
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise RequestFailed(
                f"a response took longer than {RESPONSE_S_MAX:.0f} s; look at the engine's log"
            ) from error
        except httpx2.TransportError as error:
            raise RequestFailed(f"the Endpoint broke the connection ({error}); look at the engine's log") from error
        if response.counted:
            self._words_per_token = min(4.0, max(0.1, words / max(1, response.uncached_tokens)))
        return response

    async def load(self) -> engines.EngineSignals | None:
        """The running and waiting requests that the engine reports, or None if it reports none."""
        page = await self._metrics()
        module = engines.find(self._target.engine)
        return module.read(page) if page and module is not None else None

    async def kv_tokens(self) -> int:
        """The size of the KV cache, 0 if the engine does not report it."""
        found = _CACHE_CONFIG.search(b"\n" + await self._metrics())
        if found is None:
            return 0
        labels = dict(re.findall(rb'(\w+)="([^"]*)"', found[1]))
        block, count = labels.get(b"block_size", b""), labels.get(b"num_gpu_blocks", b"")
        return int(block) * int(count) if block.isdigit() and count.isdigit() else 0

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    def _prompt(self, words: int) -> str:
        """A prompt that differs from all others from its first word, so that no prefix cache has a part of it."""
        body = " ".join(self._random.choices(_WORDS, k=words))
        return f"{self._random.getrandbits(48):012x} Tell a long story that never ends, with these words: {body}"

    async def _send(self, prompt: str, output_tokens: int) -> MeasuredResponse:
        body = {
            "model": self._target.upstream_model,
            "messages": [{"role": "user", "content": prompt}],
            "stream": True,
            "stream_options": {"include_usage": True},
            self._length_field: output_tokens,
        }
        if self._target.engine in _IGNORE_EOS_ENGINES:
            body["ignore_eos"] = True
        url = f"{self._root}{self._target.endpoint.base_path}/chat/completions"
        sent_s = time.monotonic()
        async with self._http.stream("POST", url, json=body, extensions=self._extensions) as response:
            if response.status_code == 200:
                return await self._read(response, sent_s, len(prompt))
            text = (await response.aread())[:ERROR_BYTES_MAX].decode(errors="replace")
        if response.status_code == 400 and "max_completion_tokens" in text and self._length_field == "max_tokens":
            self._length_field = "max_completion_tokens"  # newer APIs of the vendors require this name
            return await self._send(prompt, output_tokens)
        raise _error_of(response.status_code, text)

    async def _read(self, response: httpx2.Response, sent_s: float, prompt_chars: int) -> MeasuredResponse:
        kind = response.headers.get("content-type", "")
        if not kind.startswith("text/event-stream"):
            raise RequestFailed(
                f"the Endpoint responds to a streaming request with {kind[:40] or 'no content type'}, not a "
                "stream; only an engine that streams can be calibrated"
            )
        events_s: list[float] = []
        prompt, output, cached, done = 0, 0, 0, False
        async for event in _events(response):
            meaning, usage = openai.classify_event(event)
            match meaning:
                case EventMeaning.CONTENT:
                    events_s.append(time.monotonic())
                case EventMeaning.FINISH if not events_s:
                    events_s.append(time.monotonic())  # a response of one token may come in its last event
                case EventMeaning.ERROR | EventMeaning.MALFORMED:
                    excerpt = event[:200].decode(errors="replace").strip()
                    raise RequestFailed(f"the stream contains an error ({excerpt}); look at the engine's log")
                case EventMeaning.DONE:
                    done = True
            if usage is not None and usage.output:
                prompt, output, cached = usage.prompt, usage.output, _cached(event)
        if not events_s or not done:
            raise RequestFailed("a stream ended without content or before its [DONE]; look at the engine's log")
        counted = output > 0
        uncached = max(1, prompt - cached if counted else prompt_chars // 4)
        return MeasuredResponse(sent_s, tuple(events_s), time.monotonic(), uncached, output or len(events_s), counted)

    async def _metrics(self) -> bytes:
        module = engines.find(self._target.engine)
        if module is None or not module.METRICS_PATH:
            return b""
        with contextlib.suppress(httpx2.TransportError, TimeoutError):  # load is optional, as it is for health checks
            async with asyncio.timeout(LOAD_S_MAX):
                page = await self._http.get(f"{self._root}{module.METRICS_PATH}", extensions=self._extensions)
                return page.content if page.status_code == 200 else b""
        return b""


async def dialable_address(target: CalibrationTarget) -> str:
    """An allowed address of the Endpoint that accepts a connection.

    Raises: `RequestFailed`.
    """
    endpoint = target.endpoint
    match await egress.resolve_allowed(Url(endpoint.scheme, endpoint.host, endpoint.port, ""), target.ranges):
        case egress.EgressDenied() as denied:
            raise RequestFailed(f"{denied.message}; {denied.fix}")
        case found:
            pass
    reason = "it has no address"
    for address in found:
        try:
            async with asyncio.timeout(CONNECT_S_MAX):
                _, writer = await asyncio.open_connection(address, endpoint.port)
        except (OSError, TimeoutError) as error:
            reason = str(error) or "no response"
            continue
        writer.close()
        return address
    raise RequestFailed(
        f"{endpoint.origin} does not accept a connection ({reason}); start the engine or correct the URL"
    )


async def _events(response: httpx2.Response) -> AsyncIterator[bytes]:
    splitter = sse.Events()
    try:
        async for chunk in response.aiter_raw():
            for event in splitter.feed(chunk):
                yield event
    except sse.EventTooLong as error:
        raise RequestFailed("an event of the stream is too long; look at the engine's log") from error


def _cached(event: bytes) -> int:
    """The prompt tokens that were in the engine's prefix cache."""
    try:
        usage = _decode_usage(sse.data_of(event) or b"{}").usage
    except msgspec.MsgspecError:
        return 0  # reported in another form: every prompt token counts as uncached
    details = usage.prompt_tokens_details if usage is not None else None
    return (details.cached_tokens or 0) if details is not None else 0


def _error_of(status: int, text: str) -> Exception:
    excerpt = " ".join(text.split())[:200]
    if status in FULL_STATUSES:
        return EngineFull(f"{status}: {excerpt}")
    if status in (401, 403):
        return RequestFailed(
            f"the Endpoint refused the credential ({status}); name a Secret with a valid key in `credential`"
        )
    if status == 404:
        return RequestFailed(
            f"the Endpoint has no such model or path (404: {excerpt}); correct `upstream_name` or `url`"
        )
    if status in (400, 413, 422):
        return PromptTooLong(f"{status}: {excerpt}")
    return RequestFailed(f"the Endpoint responded with {status} ({excerpt}); look at the engine's log")
