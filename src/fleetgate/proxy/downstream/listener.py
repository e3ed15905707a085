"""A listening socket that can pause accepting: new connections then wait in the kernel's queue."""

import asyncio
import os
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress

HANDSHAKE_MAX_S = 10.0  # faults.md row 4: part of the time that a client has for its first head
LAST_HANDSHAKES_S_MAX = 2.0  # for connections that were still queued when the last worker stopped
SHUTDOWN_MAX_S = 2.0  # for the client's close_notify, which many clients never send
BACKLOG = 4096


class Listener:
    """Accepts on an inherited descriptor. It stays open during a pause, so that queued connections are not reset."""

    def __init__(self, fd: int, tls: ssl.SSLContext | None, make_protocol: Callable[[], asyncio.Protocol]) -> None:
        self._fd = fd
        self._tls = tls
        self._make_protocol = make_protocol
        self._server: asyncio.Server | None = None
        self._wanted = True
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> "Listener":
        """Begin to accept."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            self._make_protocol,
            sock=socket.socket(fileno=os.dup(self._fd)),
            backlog=BACKLOG,
            ssl=self._tls,
            ssl_handshake_timeout=HANDSHAKE_MAX_S if self._tls else None,
            ssl_shutdown_timeout=SHUTDOWN_MAX_S if self._tls else None,
        )
        return self

    def pause(self) -> None:
        """Accept no connection until `resume`."""
        if self._server is not None:
            server, self._server = self._server, None
            # Close later: inside the accepting callback the loop still uses the handle.
            asyncio.get_running_loop().call_soon(server.close)

    def resume(self) -> None:
        """Accept again."""
        if self._wanted and self._server is None and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._reopen())

    async def _reopen(self) -> None:
        await self.open()
        if not self._wanted:
            self.pause()

    async def close(self, last: bool) -> None:
        """Stop accepting. If this is the `last` process on the socket, accept what is queued first."""
        self._wanted = False
        if self._task is not None:
            await self._task
        self.pause()
        await asyncio.sleep(0)
        if last:
            listener = socket.socket(fileno=os.dup(self._fd))
            listener.setblocking(False)
            handshakes = []
            with listener:
                while (accepted := _accept(listener)) is not None:
                    handshakes.append(asyncio.get_running_loop().create_task(self._connect(accepted)))
            if handshakes:
                await asyncio.wait(handshakes, timeout=LAST_HANDSHAKES_S_MAX)
        os.close(self._fd)

    async def _connect(self, accepted: socket.socket) -> None:
        handshake_s = HANDSHAKE_MAX_S if self._tls else None
        with suppress(OSError):  # the client does not speak TLS, or has left
            await asyncio.get_running_loop().connect_accepted_socket(
                self._make_protocol, accepted, ssl=self._tls, ssl_handshake_timeout=handshake_s
            )


def _accept(listener: socket.socket) -> socket.socket | None:
    try:
        return listener.accept()[0]
    except OSError:
        return None
