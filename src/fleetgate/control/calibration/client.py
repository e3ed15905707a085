"""One Endpoint asked as a client would: streamed chat completions, timed event by event, and its load."""

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
from fleetgate.protocols.clients.openai import EventMeaning

CONNECT_S_MAX = 5.0
LOAD_S_MAX = 2.0
RESPONSE_S_MAX = 180.0  # an answer of a hundred tokens that takes longer is of no use to anybody
ERROR_BYTES_MAX = 4096
FULL_STATUSES = frozenset({429, 503, 529})
# These engines go on past an end-of-sequence token when told to, so that every answer has the length asked for.
_LENGTH_KEEPERS = frozenset({"vllm", "sglang", "llamacpp", "tensorrt-llm"})
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
    """The Endpoint does not do what a calibration needs; the text says what, as a sentence with a fix."""


class PromptTooLong(Exception):
    """The Endpoint refuses a prompt of this length."""


class EngineFull(Exception):
    """The Endpoint takes no more requests now."""


class MeasuredResponse(msgspec.Struct, frozen=True):
    """A whole answer. Units: moments are seconds of the machine's monotonic clock.

    Shape: `counted` says that the engine told its token counts; else they are estimates.
    """

    sent_s: float
    moments: tuple[float, ...]
    ended_s: float
    uncached_tokens: int
    output_tokens: int
    counted: bool

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.moments[0] - self.sent_s


class CalibrationTarget(msgspec.Struct, frozen=True):
    """What is asked. Shape: `credential` is sent as a bearer token, empty for none; `ranges` None for a trusted one."""

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
        # The checked address is dialled; certificate and Host are those of the name.
        self._extensions = {"sni_hostname": endpoint.host} if endpoint.scheme == "https" else {}
        self._http = httpx2.AsyncClient(
            headers={**headers, "accept-encoding": "identity"},
            timeout=httpx2.Timeout(RESPONSE_S_MAX, connect=CONNECT_S_MAX),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
            verify=ssl.create_default_context(),
            trust_env=False,
        )
        self._dice = random.Random(time.time_ns())  # prompts that no cache has seen, not secrets
        self._words_per_token = _WORDS_PER_TOKEN_FIRST
        self._length_field = "max_tokens"

    async def ask(self, prompt_tokens: int, output_tokens: int) -> MeasuredResponse:
        """Send a prompt of about so many tokens that was never sent before, and read the whole answer.

        Raises: `EngineFull`, `PromptTooLong`, `RequestFailed`.
        """
        words = max(1, int(prompt_tokens * self._words_per_token))
        prompt = self._prompt(words)
        try:
            async with asyncio.timeout(RESPONSE_S_MAX):
                answer = await self._ask(prompt, output_tokens)
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise RequestFailed(
                f"an answer took longer than {RESPONSE_S_MAX:.0f} s; look at the engine's log"
            ) from error
        except httpx2.TransportError as error:
            raise RequestFailed(f"the Endpoint broke the connection ({error}); look at the engine's log") from error
        if answer.counted:
            self._words_per_token = min(4.0, max(0.1, words / max(1, answer.uncached_tokens)))
        return answer

    async def load(self) -> engines.EngineSignals | None:
        """What the engine says it has running and waiting; None where it does not say."""
        page = await self._metrics()
        module = engines.find(self._target.engine)
        return module.read(page) if page and module is not None else None

    async def kv_tokens(self) -> int:
        """The size of the KV cache where the engine tells it, else 0."""
        found = _CACHE_CONFIG.search(b"\n" + await self._metrics())
        if found is None:
            return 0
        labels = dict(re.findall(rb'(\w+)="([^"]*)"', found[1]))
        block, count = labels.get(b"block_size", b""), labels.get(b"num_gpu_blocks", b"")
        return int(block) * int(count) if block.isdigit() and count.isdigit() else 0

    async def close(self) -> None:
        """End all connections."""
        await self._http.aclose()

    def _prompt(self, words: int) -> str:
        """Unlike any before from its first word on, so that no prefix cache has a part of it."""
        body = " ".join(self._dice.choices(_WORDS, k=words))
        return f"{self._dice.getrandbits(48):012x} Tell a long story that never ends, with these words: {body}"

    async def _ask(self, prompt: str, output_tokens: int) -> MeasuredResponse:
        body = {
            "model": self._target.upstream_model,
            "messages": [{"role": "user", "content": prompt}],
            "stream": True,
            "stream_options": {"include_usage": True},
            self._length_field: output_tokens,
        }
        if self._target.engine in _LENGTH_KEEPERS:
            body["ignore_eos"] = True
        url = f"{self._root}{self._target.endpoint.base_path}/chat/completions"
        sent_s = time.monotonic()
        async with self._http.stream("POST", url, json=body, extensions=self._extensions) as response:
            if response.status_code == 200:
                return await self._read(response, sent_s, len(prompt))
            text = (await response.aread())[:ERROR_BYTES_MAX].decode(errors="replace")
        if response.status_code == 400 and "max_completion_tokens" in text and self._length_field == "max_tokens":
            self._length_field = "max_completion_tokens"  # what newer endpoints of the vendors want instead
            return await self._ask(prompt, output_tokens)
        raise _refusal(response.status_code, text)

    async def _read(self, response: httpx2.Response, sent_s: float, prompt_chars: int) -> MeasuredResponse:
        kind = response.headers.get("content-type", "")
        if not kind.startswith("text/event-stream"):
            raise RequestFailed(
                f"the Endpoint answers a streaming request with {kind[:40] or 'no content type'}, not a "
                "stream; only an engine that streams can be calibrated"
            )
        moments: list[float] = []
        prompt, output, cached, done = 0, 0, 0, False
        async for event in _events(response):
            meaning, usage = openai.classify_event(event)
            match meaning:
                case EventMeaning.CONTENT:
                    moments.append(time.monotonic())
                case EventMeaning.FINISH if not moments:
                    moments.append(time.monotonic())  # an answer of one token comes together with its end
                case EventMeaning.ERROR | EventMeaning.MALFORMED:
                    shown = event[:200].decode(errors="replace").strip()
                    raise RequestFailed(f"the stream has an error in it ({shown}); look at the engine's log")
                case EventMeaning.DONE:
                    done = True
            if usage is not None and usage.output:
                prompt, output, cached = usage.prompt, usage.output, _cached(event)
        if not moments or not done:
            raise RequestFailed("a stream ended without content or before its [DONE]; look at the engine's log")
        counted = output > 0
        uncached = max(1, prompt - cached if counted else prompt_chars // 4)
        return MeasuredResponse(sent_s, tuple(moments), time.monotonic(), uncached, output or len(moments), counted)

    async def _metrics(self) -> bytes:
        module = engines.find(self._target.engine)
        if module is None or not module.METRICS_PATH:
            return b""
        with contextlib.suppress(httpx2.TransportError, TimeoutError):  # load is optional, as it is for the prober
            async with asyncio.timeout(LOAD_S_MAX):
                answer = await self._http.get(f"{self._root}{module.METRICS_PATH}", extensions=self._extensions)
                return answer.content if answer.status_code == 200 else b""
        return b""


async def dialable_address(target: CalibrationTarget) -> str:
    """An address of the Endpoint that may be dialled and accepts a connection.

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
            reason = str(error) or "no answer"
            continue
        writer.close()
        return address
    raise RequestFailed(
        f"{endpoint.origin} does not accept a connection ({reason}); start the engine or correct the URL"
    )


async def _events(response: httpx2.Response) -> AsyncIterator[bytes]:
    cutter = sse.Events()
    try:
        async for chunk in response.aiter_raw():
            for event in cutter.feed(chunk):
                yield event
    except sse.EventTooLong as error:
        raise RequestFailed("an event of the stream is too long; look at the engine's log") from error


def _cached(event: bytes) -> int:
    """Prompt tokens that were in the engine's prefix cache."""
    try:
        usage = _decode_usage(sse.data_of(event) or b"{}").usage
    except msgspec.MsgspecError:
        return 0  # told in another form; without it every prompt token counts
    details = usage.prompt_tokens_details if usage is not None else None
    return (details.cached_tokens or 0) if details is not None else 0


def _refusal(status: int, text: str) -> Exception:
    shown = " ".join(text.split())[:200]
    if status in FULL_STATUSES:
        return EngineFull(f"{status}: {shown}")
    if status in (401, 403):
        return RequestFailed(
            f"the Endpoint refused the credential ({status}); name a Secret that it takes in `credential`"
        )
    if status == 404:
        return RequestFailed(
            f"the Endpoint knows no such model or path (404: {shown}); correct `upstream_name` or `url`"
        )
    if status in (400, 413, 422):
        return PromptTooLong(f"{status}: {shown}")
    return RequestFailed(f"the Endpoint answered {status} ({shown}); look at the engine's log")
