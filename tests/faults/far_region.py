"""A region in a network of its own, behind a pair of virtual cables, whose packets can be lost in either direction.

The network belongs to a thread and has no name: it is gone with the thread, also when the tests are killed. Packets are
lost by a wrong hardware address, which needs neither a firewall nor its kernel modules: nobody answers, no reset comes.
"""

import ctypes
import functools
import os
import queue
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

CLONE_NEWNET = 0x40000000
NOBODY = "02:00:00:00:00:ee"


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=10, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _unshare() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")


class FarRegion:
    """A running network. Shape: `host` is its address; the tests' own side is `near`."""

    def __init__(self, number: int = 0) -> None:
        place = os.getpid() % 64 * 256 + number  # 198.18.0.0/15 is reserved for measurements and routed nowhere
        base = f"198.18.{place // 64}"
        self.near, self.host = f"{base}.{place % 64 * 4 + 1}", f"{base}.{place % 64 * 4 + 2}"
        self._cable = f"fg{os.getpid()}-{number}"[:13]
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="far-region", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self.inside(_unshare)
            here, there = self._cable + "a", self._cable + "b"
            thread = str(self._thread.native_id)
            _ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", thread)
            _ip("addr", "add", f"{self.near}/30", "dev", here)
            _ip("link", "set", here, "up")
            for words in (
                ("link", "set", "lo", "up"),
                ("addr", "add", f"{self.host}/30", "dev", there),
                ("link", "set", there, "up"),
            ):
                self.inside(functools.partial(_ip, *words))
            self._hardware = {here: self._address_of(_ip("-o", "link", "show", here))}
            self._hardware[there] = self._address_of(self.inside(lambda: _ip("-o", "link", "show", there)))
            self.lose(requests=False, replies=False)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        subprocess.run(["ip", "link", "del", self._cable + "a"], capture_output=True, timeout=10, check=False)
        self._work.put(None)
        self._thread.join(10)

    def listen(self, port: int) -> socket.socket:
        """A socket that is bound inside."""

        def bind() -> socket.socket:
            made = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((self.host, port))
            return made

        made: socket.socket = self.inside(bind)
        return made

    def lose(self, requests: bool, replies: bool) -> None:
        """From now on every packet to the region, every packet from it, both or none is lost, without a word."""
        here, there = self._cable + "a", self._cable + "b"
        target = NOBODY if requests else self._hardware[there]
        _ip("neigh", "replace", self.host, "lladdr", target, "dev", here, "nud", "permanent")
        back = NOBODY if replies else self._hardware[here]
        words = ("neigh", "replace", self.near, "lladdr", back, "dev", there, "nud", "permanent")
        self.inside(functools.partial(_ip, *words))

    def inside(self, work: Callable[[], Any]) -> Any:
        """Run something inside and wait for it; what it raises is raised here."""
        result: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._work.put((work, result))
        said = result.get(timeout=15)
        if isinstance(said, BaseException):
            raise said
        return said

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            work, result = item
            try:
                result.put(work())
            except BaseException as error:  # handed to whoever asked
                result.put(error)

    @staticmethod
    def _address_of(shown: str) -> str:
        words = shown.split()
        return words[words.index("link/ether") + 1]


@functools.cache
def why_not() -> str:
    """Why no such network can be made here; empty where one can."""
    if os.geteuid() != 0:
        return "needs root for networks of its own"
    if not shutil.which("ip"):
        return "needs `ip` (iproute2)"
    try:
        with FarRegion(63):
            return ""
    except OSError as error:
        return f"networks cannot be made here: {error}"
