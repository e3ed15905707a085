"""The kernel's state of a TCP connection, which no event of the loop reports. Only on Linux."""

import asyncio
import os
import socket
import struct
import sys
from typing import NamedTuple

_INFO_BYTES = 136
_UNACKED_AT = 24  # offsets in `struct tcp_info` of linux/tcp.h, which only ever grows at its end
_ACKED_BYTES_AT = 120
CLOSE_WAIT = 8  # the other end has sent a FIN and no reset, and this end has sent no FIN
# For a slow client the kernel keeps at most this much unsent data, instead of up to 4 MB: it counts as memory of the
# cgroup. faults.md row 5.
UNSENT_BYTES_MAX = 128 * 1024

# The network behind a kept connection may lose every packet by now; by default the kernel would retransmit a request
# for a quarter of an hour. faults.md row 55.
UNHEARD_MS_MAX = 2000  # the kernel takes up to 1.5 s longer, until its next retransmission


class TcpInfo(NamedTuple):
    """One end of a TCP connection. Units: `unacked` in packets."""

    state: int
    unacked: int
    acked_bytes: int


def read_tcp_info(transport: asyncio.BaseTransport) -> TcpInfo | None:
    """Read the kernel's state of a connection; None if it has none. Cost: 1 µs."""
    connection = transport.get_extra_info("socket")
    if sys.platform != "linux" or connection is None:
        return None
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    except OSError:  # closed on this side meanwhile
        return None
    if len(info) < _INFO_BYTES:
        return None
    (unacked,) = struct.unpack_from("I", info, _UNACKED_AT)
    (acked_bytes,) = struct.unpack_from("Q", info, _ACKED_BYTES_AT)
    return TcpInfo(info[0], unacked, acked_bytes)


def limit_unsent(listen_fd: int) -> None:
    """Limit what the kernel keeps unsent on each connection that this listener accepts."""
    with socket.socket(fileno=os.dup(listen_fd)) as listener:
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES_MAX)


def limit_unacknowledged(transport: asyncio.BaseTransport) -> None:
    """Let the kernel end a connection if the other end acknowledges nothing; it is then lost as if it was reset."""
    connection = transport.get_extra_info("socket")
    if connection is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNHEARD_MS_MAX)
