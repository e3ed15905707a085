"""Finds out, once an Endpoint is up, whether its engine goes on with an answer that another had begun.

It is let answer a small greedy request, and then asked to go on from the middle of what it said. Only an engine that
goes on as before is trusted with the half answers of a client. The worker that probes does it for all; engines of kind
`openai` are never asked, for theirs may be paid by the token.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from fleetgate.core.board import Signal
from fleetgate.protocols.http1 import Malformed
from fleetgate.protocols.resume import Transcript, prefix_fields
from fleetgate.protocols.sse import Events, EventTooLong
from fleetgate.proxy.prober import OneAnswer
from fleetgate.proxy.tables import Place
from fleetgate.proxy.transport.upstream import Peer, Refused

if TYPE_CHECKING:
    from fleetgate.proxy.hub import Hub

ENGINES = frozenset({"vllm", "sglang", "llamacpp"})
LOOK_EVERY_S = 1.0
TIMEOUT_S = 20.0
CHAT = b"/v1/chat/completions"
SAID_TOKENS = 16
UNKNOWN, YES, NO = 0, 1, 2


class PrefillProbe:
    """One worker's probing. Shape: `mine` says whether this worker does it."""

    def __init__(self, hub: "Hub", mine: Callable[[], bool]) -> None:
        self._hub = hub
        self._mine = mine
        self._asked: set[tuple[Peer, str]] = set()

    async def run(self) -> None:
        """Look for Endpoints that came up, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if self._mine():
                for place in list(self._hub.tables.places.values()):
                    for peer in place.peers:
                        await self._look(place, peer)

    async def _look(self, place: Place, peer: Peer) -> None:
        board, slot = self._hub.board, peer.endpoint.slot
        identity = (peer, place.deployment.name)
        if not board.signal(slot, Signal.UP):
            # What comes up again may be another engine.
            self._asked.discard(identity)
            board.set_signal(slot, Signal.PREFILL, UNKNOWN)
        elif place.deployment.engine in ENGINES and identity not in self._asked and self._take_place(place):
            self._asked.add(identity)
            try:
                goes_on = await self._goes_on(place, peer)
            finally:
                self._hub.ledger.settle(place.slot)
                self._hub.room_freed(place.slot)
            board.set_signal(slot, Signal.PREFILL, YES if goes_on else NO)

    def _take_place(self, place: Place) -> bool:
        """Its requests count against the limit as a client's do; where there is no room they wait for quieter times."""
        return not place.foreign and self._hub.ledger.reserve(place.slot, place.limit)

    async def _goes_on(self, place: Place, peer: Peer) -> bool:
        """Whether an answer and one that goes on from its middle are the same."""
        asked = {"role": "user", "content": "Tell me about the sea."}
        said = await self._ask(place, peer, {"messages": [asked]})
        cut = said.find(" ", len(said) // 2)
        if cut <= 0:
            return False
        begun = {"role": "assistant", "content": said[:cut]}
        rest = await self._ask(place, peer, {"messages": [asked, begun], **prefix_fields(place.deployment.engine)})
        again = said[:cut] + rest
        return bool(rest) and (again.startswith(said) or said.startswith(again))

    async def _ask(self, place: Place, peer: Peer, what: dict[str, object]) -> str:
        """The text of one answer, empty where there is none; streamed, as it is for clients: llama.cpp repeats what was
        said in an answer that is not."""
        model = next(iter(place.upstream_names.values()), "")
        body = msgspec.json.encode(
            {"model": model, "max_tokens": SAID_TOKENS, "temperature": 0, "stream": True, **what}
        )
        head = b"%bconnection: close\r\ncontent-length: %d\r\n\r\n" % (place.heads[peer.endpoint.slot][CHAT], len(body))
        answer = OneAnswer(self._hub.loop)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                connection = await peer.connect(self._hub.loop, TIMEOUT_S)
                try:
                    connection.carry(answer, (head + body,))
                    response, data = await answer.answer
                finally:
                    connection.drop()
            events = Events().feed(data) if response.status == 200 else []
        except (OSError, TimeoutError, ssl.SSLError, Refused, Malformed, EventTooLong):
            return ""
        transcript = Transcript()
        for event in events:
            transcript.keep(event)
        return "".join(text for channel, text in transcript.runs if channel == "content")
