"""Finds out, once an Endpoint is up, whether its engine goes on with an answer that another had begun.

It is let answer a small greedy request, and then asked to go on from the middle of what it said, by text and, where it
gave token ids, by those. Only an engine that goes on as before is trusted with the half answers of a client. The worker
that probes does it for all; engines of kind `openai` are never asked, for theirs may be paid by the token.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from fleetgate.ipc.shared_memory import EndpointSignal
from fleetgate.protocols.http1 import Malformed
from fleetgate.protocols.resume.token_ids import COMPLETIONS, mark_of
from fleetgate.protocols.resume.transcript import Transcript, prefix_fields
from fleetgate.protocols.sse import Events, EventTooLong
from fleetgate.proxy.health.active_health import ProbeResponse
from fleetgate.proxy.routing.routing_table import DeploymentState
from fleetgate.proxy.transport.connection_pool import AddressRefused, EndpointState

if TYPE_CHECKING:
    from fleetgate.proxy.worker.services import Hub

ENGINES = frozenset({"vllm", "sglang", "llamacpp"})
LOOK_EVERY_S = 1.0
TIMEOUT_S = 20.0
CHAT = b"/v1/chat/completions"
SAID_TOKENS = 16
UNKNOWN, YES, NO = 0, 1, 2
NO_MARK = 1
ASKED = {"role": "user", "content": "Tell me about the sea."}


class ResumeProbe:
    """One worker's probing. Shape: `mine` says whether this worker does it."""

    def __init__(self, hub: "Hub", mine: Callable[[], bool]) -> None:
        self._hub = hub
        self._mine = mine
        self._asked: set[tuple[EndpointState, str]] = set()

    async def run(self) -> None:
        """Look for Endpoints that came up, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if self._mine():
                for place in list(self._hub.tables.places.values()):
                    for peer in place.peers:
                        await self._look(place, peer)

    async def _look(self, place: DeploymentState, peer: EndpointState) -> None:
        board, slot = self._hub.board, peer.endpoint.slot
        identity = (peer, place.deployment.name)
        if not board.signal(slot, EndpointSignal.UP):
            # What comes up again may be another engine.
            self._asked.discard(identity)
            board.set_signal(slot, EndpointSignal.PREFILL, UNKNOWN)
            board.set_signal(slot, EndpointSignal.TOKENS, UNKNOWN)
        elif place.deployment.engine in ENGINES and identity not in self._asked and self._take_place(place):
            self._asked.add(identity)
            try:
                said = await self._ask(place, peer, {"messages": [ASKED], "return_token_ids": True})
                goes_on = await self._goes_on(place, peer, _content(said))
                mark = await self._token_mark(place, peer, said)
            finally:
                self._hub.ledger.settle(place.slot)
                self._hub.room_freed(place.slot)
            board.set_signal(slot, EndpointSignal.TOKENS, mark)
            board.set_signal(slot, EndpointSignal.PREFILL, YES if goes_on else NO)

    def _take_place(self, place: DeploymentState) -> bool:
        """Its requests count against the limit as a client's do; where there is no room they wait for quieter times."""
        return not place.foreign and not place.paused and self._hub.ledger.reserve(place.slot, place.limit)

    async def _goes_on(self, place: DeploymentState, peer: EndpointState, said: str) -> bool:
        """Whether an answer and one that goes on from its middle are the same."""
        cut = said.find(" ", len(said) // 2)
        if cut <= 0:
            return False
        begun = {"role": "assistant", "content": said[:cut]}
        fields = prefix_fields(place.deployment.engine)
        rest = _content(await self._ask(place, peer, {"messages": [ASKED, begun], **fields}))
        again = said[:cut] + rest
        return bool(rest) and (again.startswith(said) or said.startswith(again))

    async def _token_mark(self, place: DeploymentState, peer: EndpointState, said: Transcript) -> int:
        """Whose token ids it gives and takes: from its middle, the same ids must follow."""
        half = len(said.ids) // 2
        if not said.token_mark or not said.prompt_ids or not half:
            return NO_MARK
        begun, expected = [*said.prompt_ids, *said.ids[:half]], said.ids[half:]
        rest = await self._ask(place, peer, {"prompt": begun, "return_token_ids": True}, COMPLETIONS)
        if list(rest.prompt_ids or ()) != begun or rest.ids[: len(expected)] != expected:
            return NO_MARK
        return mark_of(next(iter(place.upstream_names.values()), ""), said.prompt_ids)

    async def _ask(
        self, place: DeploymentState, peer: EndpointState, what: dict[str, object], path: bytes = CHAT
    ) -> Transcript:
        """What one answer says, nothing where there is none; streamed, as it is for clients: llama.cpp repeats what was
        said in an answer that is not."""
        model = next(iter(place.upstream_names.values()), "")
        body = msgspec.json.encode(
            {"model": model, "max_tokens": SAID_TOKENS, "temperature": 0, "stream": True, **what}
        )
        head = b"%bconnection: close\r\ncontent-length: %d\r\n\r\n" % (place.heads[peer.endpoint.slot][path], len(body))
        answer = ProbeResponse(self._hub.loop)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                connection = await peer.connect(self._hub.loop, TIMEOUT_S)
                try:
                    connection.carry(answer, (head + body,))
                    response, data = await answer.answer
                finally:
                    connection.drop()
            events = Events().feed(data) if response.status == 200 else []
        except (OSError, TimeoutError, ssl.SSLError, AddressRefused, Malformed, EventTooLong):
            events = []
        transcript = Transcript(NO_MARK)
        for event in events:
            transcript.keep(event)
        transcript.digest()
        return transcript


def _content(said: Transcript) -> str:
    return "".join(text for channel, text in said.runs if channel == "content")
