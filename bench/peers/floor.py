"""The minimum cost of a proxy on uvloop: it moves bytes between two connections without reading them."""

import asyncio
import importlib.metadata
import sys
from pathlib import Path
from typing import cast

import uvloop

from bench.machine import free_port
from bench.peers.base import Running, Site, serve

ROOT = Path(__file__).parents[2]


class Floor:
    """The cost of the event loop alone, without anything that Fleetgate does."""

    name = "uvloop-bytes"
    slow = False
    exact = True
    about = "moves bytes only: what any proxy on this event loop must spend"

    def version(self) -> str:
        """The version of the event loop."""
        return importlib.metadata.version("uvloop")

    def start(self, site: Site) -> Running:
        """Start it, always with one process."""
        port = free_port()
        argv = [sys.executable, "-m", "bench.peers.floor", str(port), str(site.mock_port)]
        return serve(argv, site, self.name, port, {"PYTHONPATH": str(ROOT)})


class _Upstream(asyncio.Protocol):
    """The far side of one client's connection."""

    def __init__(self, client: asyncio.WriteTransport) -> None:
        self._client = client

    def data_received(self, data: bytes) -> None:
        self._client.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.close()


class _Client(asyncio.Protocol):
    """One client's connection; data that arrives before the upstream is connected is kept."""

    def __init__(self, mock_port: int) -> None:
        self._mock_port = mock_port
        self._early: list[bytes] = []
        self._upstream: asyncio.WriteTransport | None = None
        self._dial: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # No `isinstance`: uvloop's transports do not derive from asyncio's classes.
        self._dial = asyncio.get_running_loop().create_task(self._connect(cast(asyncio.WriteTransport, transport)))

    async def _connect(self, client: asyncio.WriteTransport) -> None:
        loop = asyncio.get_running_loop()
        self._upstream, _ = await loop.create_connection(lambda: _Upstream(client), "127.0.0.1", self._mock_port)
        self._upstream.writelines(self._early)

    def data_received(self, data: bytes) -> None:
        if self._upstream is None:
            self._early.append(data)
        else:
            self._upstream.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._upstream is not None:
            self._upstream.close()


async def relay(port: int, mock_port: int) -> None:
    """Move bytes until the process ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Client(mock_port), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(relay(int(sys.argv[1]), int(sys.argv[2])))
