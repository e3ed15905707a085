"""Checks, once an Endpoint is up, whether its engine can continue a response that another engine began.

The probe sends a small greedy request, then asks the engine to continue from the middle of that response, by text and,
if the engine returned token ids, by those. Only an engine that continues its own response as before may resume streams
of clients. The worker that probes does this for all workers. Engines of kind `openai` are not probed: they may bill
each token.
"""

import asyncio
import ssl
from collections.abc import Callable

import msgspec

from fleetgate.core.admission.ledger import Ledger
from fleetgate.ipc.shared_memory import EndpointSignal, SharedMemory
from fleetgate.protocols import clients
from fleetgate.protocols.http1 import Malformed
from fleetgate.protocols.resume.prefill import prefix_fields
from fleetgate.protocols.resume.token_ids import COMPLETIONS, mark_of
from fleetgate.protocols.resume.transcript import Transcript
from fleetgate.protocols.sse import Events, EventTooLong
from fleetgate.proxy.health.active_health import ProbeResponse
from fleetgate.proxy.routing.active_table import ActiveTable
from fleetgate.proxy.routing.deployment_state import DeploymentState
from fleetgate.proxy.routing.endpoint_state import EndpointState
from fleetgate.proxy.routing.routing_table import PROBE_PROTOCOL
from fleetgate.proxy.transport.dns import AddressRefused
from fleetgate.proxy.transport.network import Network

OPENAI = clients.find(PROBE_PROTOCOL)
ENGINES = frozenset({"vllm", "sglang", "llamacpp"})
CHECK_EVERY_S = 1.0
TIMEOUT_S = 20.0
CHAT = b"/v1/chat/completions"
PROBE_TOKENS = 16
UNKNOWN, YES, NO = 0, 1, 2
NO_MARK = 1
QUESTION = {"role": "user", "content": "Tell me about the sea."}


class ResumeProbe:
    """One worker's resume probes. Shape: `is_prober` says whether this worker probes; `slot_freed` wakes requests."""

    def __init__(
        self,
        active: ActiveTable,
        shared: SharedMemory,
        ledger: Ledger,
        network: Network,
        is_prober: Callable[[], bool],
        slot_freed: Callable[[], None],
    ) -> None:
        self._active = active
        self._shared = shared
        self._ledger = ledger
        self._network = network
        self._is_prober = is_prober
        self._slot_freed = slot_freed
        self._probed: set[tuple[EndpointState, str]] = set()

    async def run(self) -> None:
        """Probe Endpoints that came up, until cancelled."""
        while True:
            await asyncio.sleep(CHECK_EVERY_S)
            if self._is_prober():
                for deployment in list(self._active.current.deployments.values()):
                    for endpoint in deployment.endpoints:
                        await self._check(deployment, endpoint)

    async def _check(self, deployment: DeploymentState, endpoint: EndpointState) -> None:
        shared, slot = self._shared, endpoint.spec.slot
        identity = (endpoint, deployment.spec.name)
        if not shared.signal(slot, EndpointSignal.UP):
            # After a restart it may be another engine.
            self._probed.discard(identity)
            shared.set_signal(slot, EndpointSignal.PREFILL, UNKNOWN)
            shared.set_signal(slot, EndpointSignal.TOKENS, UNKNOWN)
        elif deployment.spec.engine in ENGINES and identity not in self._probed and self._reserve(deployment):
            self._probed.add(identity)
            try:
                first = await self._request(deployment, endpoint, {"messages": [QUESTION], "return_token_ids": True})
                continues = await self._continues(deployment, endpoint, _content(first))
                mark = await self._token_mark(deployment, endpoint, first)
            finally:
                self._ledger.settle(deployment.slot)
                self._slot_freed()
            shared.set_signal(slot, EndpointSignal.TOKENS, mark)
            shared.set_signal(slot, EndpointSignal.PREFILL, YES if continues else NO)

    def _reserve(self, deployment: DeploymentState) -> bool:
        """Reserve a slot as for a client's request; False if the Deployment has none free."""
        if deployment.external_in_flight or deployment.paused:
            return False
        return self._ledger.reserve(deployment.slot, deployment.limit)

    async def _continues(self, deployment: DeploymentState, endpoint: EndpointState, whole: str) -> bool:
        """Whether the engine continues a response from its middle as before."""
        cut = whole.find(" ", len(whole) // 2)
        if cut <= 0:
            return False
        begun = {"role": "assistant", "content": whole[:cut]}
        fields = prefix_fields(deployment.spec.engine)
        rest = _content(await self._request(deployment, endpoint, {"messages": [QUESTION, begun], **fields}))
        again = whole[:cut] + rest
        return bool(rest) and (again.startswith(whole) or whole.startswith(again))

    async def _token_mark(self, deployment: DeploymentState, endpoint: EndpointState, first: Transcript) -> int:
        """The mark of the engine's token ids, if it continues from the middle with the same ids; else `NO_MARK`."""
        half = len(first.ids) // 2
        if not first.token_mark or not first.prompt_ids or not half:
            return NO_MARK
        begun, expected = [*first.prompt_ids, *first.ids[:half]], first.ids[half:]
        rest = await self._request(deployment, endpoint, {"prompt": begun, "return_token_ids": True}, COMPLETIONS)
        if list(rest.prompt_ids or ()) != begun or rest.ids[: len(expected)] != expected:
            return NO_MARK
        return mark_of(next(iter(deployment.upstream_names.values()), ""), first.prompt_ids)

    async def _request(
        self, deployment: DeploymentState, endpoint: EndpointState, fields: dict[str, object], path: bytes = CHAT
    ) -> Transcript:
        """The transcript of one response, empty after a failure.

        It is streamed, as for clients: llama.cpp repeats the prefix in a response that is not.
        """
        model = next(iter(deployment.upstream_names.values()), "")
        body = msgspec.json.encode(
            {"model": model, "max_tokens": PROBE_TOKENS, "temperature": 0, "stream": True, **fields}
        )
        begin = deployment.request_heads[endpoint.spec.slot][OPENAI][path]
        head = b"%bconnection: close\r\ncontent-length: %d\r\n\r\n" % (begin, len(body))
        response = ProbeResponse(asyncio.get_running_loop())
        try:
            async with asyncio.timeout(TIMEOUT_S):
                connection = await endpoint.pool.connect(self._network, TIMEOUT_S)
                try:
                    connection.carry(response, (head + body,))
                    answer, data = await response.result
                finally:
                    connection.drop()
            events = Events().feed(data) if answer.status == 200 else []
        except (OSError, TimeoutError, ssl.SSLError, AddressRefused, Malformed, EventTooLong):
            events = []
        transcript = Transcript(NO_MARK)
        for event in events:
            transcript.keep(event)
        transcript.digest()
        return transcript


def _content(transcript: Transcript) -> str:
    return "".join(text for channel, text in transcript.runs if channel == "content")
