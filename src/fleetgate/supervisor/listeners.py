"""Listening sockets, which the supervisor opens once and its children inherit."""

import socket

BACKLOG = 4096  # connections that wait until a worker accepts them


class CannotStart(Exception):
    """`fleetgate up` cannot start. The text names the flag or the file and the fix."""


def split_address(address: str, flag: str) -> tuple[str, int]:
    """Split `HOST:PORT`; an empty HOST is 127.0.0.1.

    Raises: `CannotStart`, which names the flag.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not port.isdigit() or int(port) > 65535:
        raise CannotStart(f"{flag} {address!r} is not HOST:PORT; give a port from 0 to 65535, as in 127.0.0.1:7800")
    return host, int(port)


def open_listener(address: str, flag: str, reuse_port: bool = False) -> socket.socket:
    """Open a listening socket on `HOST:PORT`.

    Raises: `CannotStart`, which names the flag.
    """
    host, port = split_address(address, flag)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse_port:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise CannotStart(f"cannot listen on {address}: {error.strerror}; choose another address with {flag}") from None
    listener.setblocking(False)
    return listener


def open_listeners(address: str, flag: str, count: int) -> list[socket.socket]:
    """Open one socket for each worker on one port; the kernel spreads connections over them.

    Raises: `CannotStart`, which names the flag.
    """
    host, port = split_address(address, flag)
    # Without SO_REUSEPORT first: with it, a port that another program of this user shares would look free.
    if port:
        open_listener(address, flag).close()
    first = open_listener(address, flag, reuse_port=True)
    bound = f"[{host}]:{first.getsockname()[1]}" if ":" in host else f"{host}:{first.getsockname()[1]}"
    return [first, *(open_listener(bound, flag, reuse_port=True) for _ in range(count - 1))]
