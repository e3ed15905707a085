"""Harm to a whole region for a while: a TCP proxy in front of it whose behaviour changes by a schedule.

One seed is one schedule. One region is spared all through it, so that every request can be answered.
"""

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, Self

import msgspec

Kind = Literal["fair", "refuse", "reset", "cut", "silent", "slow"]
KINDS: tuple[Kind, ...] = ("reset", "cut", "silent", "slow")  # whose harm is counted; nobody sees who was refused
CUT_BYTES_MAX = 4000
SLOW_S = 0.1


class Spell(msgspec.Struct, frozen=True):
    """One fault of one region."""

    at_s: float
    for_s: float
    region: int
    kind: Kind


def schedule(seed: int, regions: int, for_s: float) -> list[Spell]:
    """Faults one after the other in every region but one."""
    dice = random.Random(seed)
    spared = dice.randrange(regions)
    spells = []
    for region in range(regions):
        at_s = dice.uniform(0.5, 1.5)
        while region != spared and at_s < for_s - 1.0:
            spell = Spell(at_s, dice.uniform(0.2, 1.5), region, dice.choice(KINDS))
            spells.append(spell)
            at_s += spell.for_s + dice.uniform(0.3, 2.0)
    return sorted(spells, key=lambda spell: spell.at_s)


class Pipe(asyncio.Protocol):
    """One side of a connection that is passed on."""

    def __init__(self, weather: "Weather", passes: bool) -> None:
        self.weather = weather
        self.other: Pipe | None = None
        self.transport: asyncio.Transport | None = None
        self.left_bytes: int | None = None
        self.answers = passes  # whether it hears the region, whose bytes may be cut
        self._held: list[bytes] = []
        self._late = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def connection_lost(self, error: Exception | None) -> None:
        self.weather.forget(self)
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()

    def data_received(self, data: bytes) -> None:
        kind = self.weather.kind
        if kind == "silent":
            return
        if self.answers and (kind == "slow" or self._late):
            self._late += 1
            asyncio.get_running_loop().call_later(SLOW_S, self._give_late, data)
        else:
            self._give(data)

    def _give_late(self, data: bytes) -> None:
        self._late -= 1
        self._give(data)

    def _give(self, data: bytes) -> None:
        cut = self.answers and self.left_bytes is not None and self.left_bytes < len(data)
        if self.answers and self.left_bytes is not None:
            data, self.left_bytes = data[: self.left_bytes], max(0, self.left_bytes - len(data))
        if self.other is None or self.other.transport is None:
            self._held.append(data)  # the region is still being dialled
        elif data:
            self.other.transport.write(data)
        if cut:
            # So that what was sent is read before the reset discards it.
            asyncio.get_running_loop().call_later(0.005, self.weather.harm, self)

    def join(self, other: "Pipe") -> None:
        """From now on what one hears the other says."""
        self.other, other.other = other, self
        for data in self._held:
            if other.transport is not None:
                other.transport.write(data)


class Weather:
    """A running proxy in front of one port. Shape: `harmed` counts the connections that it ended."""

    def __init__(self, target_port: int, seed: int) -> None:
        self.port = 0
        self.kind: Kind = "fair"
        self.harmed = 0
        self.served = 0
        self._target_port = target_port
        self._dice = random.Random(seed)
        self._pipes: set[Pipe] = set()
        self._server: asyncio.Server
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="weather", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def become(self, kind: Kind) -> None:
        """Change, and end what the last weather left behind."""
        asyncio.run_coroutine_threadsafe(self._become(kind), self._loop).result(10)

    async def _become(self, kind: Kind) -> None:
        was, self.kind = self.kind, kind
        if kind == "refuse":
            self._server.close()
        if kind in ("refuse", "reset") or was == "silent":  # what was swallowed cannot be made up for
            for pipe in list(self._pipes):
                self.harm(pipe)
        for pipe in self._pipes:
            pipe.left_bytes = self._dice.randrange(CUT_BYTES_MAX) if kind == "cut" else None
        if was == "refuse" and kind != "refuse":
            await self._open(self.port)

    def forget(self, pipe: Pipe) -> None:
        """It ended by itself."""
        self._pipes.discard(pipe)
        if pipe.other is not None:
            self._pipes.discard(pipe.other)

    def harm(self, pipe: Pipe) -> None:
        """End one connection by RST."""
        if pipe not in self._pipes:
            return
        self._pipes.discard(pipe)
        self.harmed += 1
        for side in (pipe, pipe.other):
            if side is not None and side.transport is not None and not side.transport.is_closing():
                linger = struct.pack("ii", 1, 0)
                with contextlib.suppress(OSError):
                    side.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                side.transport.abort()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._open(0))
        self._ready.set()
        self._loop.run_forever()
        self._server.close()
        for pipe in list(self._pipes):
            self.harm(pipe)
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _open(self, port: int) -> None:
        self._server = await self._loop.create_server(self._accept, "127.0.0.1", port, reuse_address=True, backlog=512)
        self.port = self._server.sockets[0].getsockname()[1]

    def _accept(self) -> Pipe:
        self.served += 1
        front = Pipe(self, False)
        self._loop.create_task(self._dial(front))
        return front

    async def _dial(self, front: Pipe) -> None:
        back = Pipe(self, True)
        try:
            await self._loop.create_connection(lambda: back, "127.0.0.1", self._target_port)
        except OSError:
            if front.transport is not None:
                front.transport.abort()
            return
        self._pipes.add(back)
        front.join(back)
        if self.kind in ("reset", "refuse"):
            self.harm(back)
        elif self.kind == "cut":
            back.left_bytes = self._dice.randrange(CUT_BYTES_MAX)


async def play(spells: Sequence[Spell], over: Sequence[Weather]) -> None:
    """Let a schedule happen."""
    began_s = asyncio.get_running_loop().time()
    changes = [(spell.at_s, spell.region, spell.kind) for spell in spells]
    changes += [(spell.at_s + spell.for_s, spell.region, "fair") for spell in spells]
    for at_s, region, kind in sorted(changes):
        await asyncio.sleep(began_s + at_s - asyncio.get_running_loop().time())
        await asyncio.to_thread(over[region].become, kind)
