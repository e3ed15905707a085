"""What the kernel knows of a client's connection and no event tells. Linux only: elsewhere nothing is known."""

import asyncio
import os
import socket
import struct
import sys
from typing import NamedTuple

_INFO_BYTES = 136
_UNACKED_AT = 24  # offsets in `struct tcp_info` of linux/tcp.h, which only ever grows at its end
_ACKED_BYTES_AT = 120
CLOSE_WAIT = 8  # the peer has sent its FIN, we have not, and it has not answered us with a reset
# Beyond what is on its way, the kernel keeps only this much of an answer for a client that reads slowly, in place of
# up to 4 MB: it counts against the memory of the cgroup. FAULTS.md row 5.
UNSENT_BYTES_MAX = 128 * 1024

# A kept connection may lead into a network that loses everything by now; left alone, the kernel would try to get a
# request through for a quarter of an hour. FAULTS.md row 55.
UNHEARD_MS_MAX = 2000  # the kernel takes up to 1.5 s longer, by when it tries again


class TcpInfo(NamedTuple):
    """One end of a TCP connection. Units: `unacked` in packets."""

    state: int
    unacked: int
    acked_bytes: int


def read_tcp_info(transport: asyncio.BaseTransport) -> TcpInfo | None:
    """Ask the kernel; None where it cannot tell. Cost: 1 µs."""
    peer = transport.get_extra_info("socket")
    if sys.platform != "linux" or peer is None:
        return None
    try:
        info = peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    except OSError:  # closed on our side meanwhile
        return None
    if len(info) < _INFO_BYTES:
        return None
    (unacked,) = struct.unpack_from("I", info, _UNACKED_AT)
    (acked_bytes,) = struct.unpack_from("Q", info, _ACKED_BYTES_AT)
    return TcpInfo(info[0], unacked, acked_bytes)


def limit_unsent(listen_fd: int) -> None:
    """Bound what the kernel keeps unsent on every connection that this listener will accept."""
    with socket.socket(fileno=os.dup(listen_fd)) as listener:
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES_MAX)


def limit_unacknowledged(transport: asyncio.BaseTransport) -> None:
    """End a connection whose peer does not acknowledge what it is sent; it is then lost like one that was reset."""
    peer = transport.get_extra_info("socket")
    if peer is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNHEARD_MS_MAX)
