"""A listening socket that stops accepting for a while and loses no client by it."""

import asyncio
import socket

from fleetgate.proxy.downstream.listener import Listener


class Greeting(asyncio.Protocol):
    """Sends a word to each client."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(b"hello")
        transport.close()


async def _greeted(reader: asyncio.StreamReader) -> bytes:
    return await asyncio.wait_for(reader.read(), 5.0)


def test_clients_that_come_while_it_is_paused_wait() -> None:
    async def scene() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            listener = await Listener(server.detach(), None, Greeting).open()
            reader, _ = await asyncio.open_connection("127.0.0.1", port)
            assert await _greeted(reader) == b"hello"
            listener.pause()
            await asyncio.sleep(0.02)
            reader, _ = await asyncio.open_connection("127.0.0.1", port)
            waiting = asyncio.ensure_future(_greeted(reader))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            listener.resume()
            assert await waiting == b"hello"
            await listener.close(last=False)

    asyncio.run(scene())


def test_the_last_process_takes_those_that_wait() -> None:
    async def scene() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            listener = await Listener(server.detach(), None, Greeting).open()
            listener.pause()
            await asyncio.sleep(0.02)
            reader, _ = await asyncio.open_connection("127.0.0.1", port)
            await listener.close(last=True)
            assert await _greeted(reader) == b"hello"

    asyncio.run(scene())
