"""A TCP proxy that does harm: it cuts what an upstream sends at a byte, by RST, FIN or silence."""

import asyncio
import contextlib
import random
import socket
import struct
import threading
from types import TracebackType
from typing import Literal

import msgspec

How = Literal["rst", "fin", "stall"]
HOWS: tuple[How, ...] = ("rst", "fin", "stall")


class Cut(msgspec.Struct, frozen=True):
    """What happens to one connection. Units: `after_bytes` of what the upstream sends, -1 for never."""

    after_bytes: int = -1
    how: How = "rst"


class Chaos:
    """A running proxy in front of one port. Shape: `cuts` are taken by new connections, the first one first."""

    def __init__(self, target_port: int) -> None:
        self.port = 0
        self.cuts: list[Cut] = []
        self.done: list[Cut] = []
        self._target_port = target_port
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos", daemon=True)

    def __enter__(self) -> "Chaos":
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.05))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        cut = self.cuts.pop(0) if self.cuts else Cut()
        try:
            down, up = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.close()
            return
        ahead = asyncio.create_task(_pass_on(reader, up))
        try:
            await self._pass_back(down, writer, cut)
        except asyncio.CancelledError:
            pass  # the test is over; asyncio's server would call a cancelled task an error
        finally:
            ahead.cancel()
            up.close()
            writer.close()

    async def _pass_back(self, down: asyncio.StreamReader, writer: asyncio.StreamWriter, cut: Cut) -> None:
        passed = 0
        while data := await down.read(65536):
            left = cut.after_bytes - passed if cut.after_bytes >= 0 else len(data)
            passed += len(data)
            with contextlib.suppress(ConnectionError):
                writer.write(data[: max(0, left)])
                await writer.drain()
            if left < len(data):
                self.done.append(cut)
                await self._cut(writer, cut)
                return

    async def _cut(self, writer: asyncio.StreamWriter, cut: Cut) -> None:
        if cut.how == "stall":
            with contextlib.suppress(ConnectionError):
                while not writer.is_closing():
                    await asyncio.sleep(0.1)
                    if writer.get_extra_info("socket").fileno() < 0:
                        return
        elif cut.how == "rst":
            await asyncio.sleep(0.005)  # so that what was sent is read before the reset discards it
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()


async def _pass_on(reader: asyncio.StreamReader, up: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            up.write(data)
            await up.drain()
        up.close()


def cuts(dice: random.Random, count: int, bytes_max: int) -> list[Cut]:
    """Cuts at random places; few stalls, for each takes as long as it takes to notice one."""
    return [Cut(dice.randrange(bytes_max), dice.choices(HOWS, (49, 49, 2))[0]) for _ in range(count)]
