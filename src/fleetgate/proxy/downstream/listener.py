"""A listening socket that can stop accepting for a while: who comes then waits in the kernel's queue."""

import asyncio
import os
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress

HANDSHAKE_MAX_S = 10.0  # FAULTS.md row 4: it is part of the time a client has for its first head
LAST_S_MAX = 2.0  # for the handshakes of those who were waiting when the last worker went
SHUTDOWN_MAX_S = 2.0  # for the answer to our close_notify, which many never send
BACKLOG = 4096


class Listener:
    """Accepts on an inherited descriptor. Shape: the descriptor stays open, so nobody in the queue is reset."""

    def __init__(self, fd: int, tls: ssl.SSLContext | None, make: Callable[[], asyncio.Protocol]) -> None:
        self._fd = fd
        self._tls = tls
        self._make = make
        self._server: asyncio.Server | None = None
        self._wanted = True
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> "Listener":
        """Begin to accept."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            self._make,
            sock=socket.socket(fileno=os.dup(self._fd)),
            backlog=BACKLOG,
            ssl=self._tls,
            ssl_handshake_timeout=HANDSHAKE_MAX_S if self._tls else None,
            ssl_shutdown_timeout=SHUTDOWN_MAX_S if self._tls else None,
        )
        return self

    def pause(self) -> None:
        """Accept nobody until `resume`."""
        if self._server is not None:
            server, self._server = self._server, None
            # Not inside the callback that accepts: the loop still holds the handle there.
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
        """Accept nobody any more; where no other process will, first take who is waiting to be accepted."""
        self._wanted = False
        if self._task is not None:
            await self._task
        self.pause()
        await asyncio.sleep(0)
        if last:
            listener = socket.socket(fileno=os.dup(self._fd))
            listener.setblocking(False)
            coming = []
            with listener:
                while (waiting := _next(listener)) is not None:
                    coming.append(asyncio.get_running_loop().create_task(self._let_in(waiting)))
            if coming:
                await asyncio.wait(coming, timeout=LAST_S_MAX)
        os.close(self._fd)

    async def _let_in(self, waiting: socket.socket) -> None:
        handshake_s = HANDSHAKE_MAX_S if self._tls else None
        with suppress(OSError):  # who does not speak TLS, or has left, is not let in
            await asyncio.get_running_loop().connect_accepted_socket(
                self._make, waiting, ssl=self._tls, ssl_handshake_timeout=handshake_s
            )


def _next(listener: socket.socket) -> socket.socket | None:
    try:
        return listener.accept()[0]
    except OSError:
        return None
