"""The supervisor: opens sockets and shared memory once, starts the processes that use them, starts them again.

It serves nothing itself. A listening socket outlives the worker that accepts from it, so a worker's death resets no
connection that still waits in the backlog.
"""

import mmap
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fleetgate.ipc.log import Log
from fleetgate.ipc.shared_memory import ControlPlaneCell, SharedMemory, WorkerCell
from fleetgate.proxy.worker.config import RETIRE
from fleetgate.supervisor.child_process import ChildProcess
from fleetgate.supervisor.rolling_upgrade import ProcessControl, RollingUpgrade, UpgradeHooks

RESTART_FIRST_S = 0.2
RESTART_MAX_S = 10.0
STEADY_S = 30.0  # a child that ran this long starts its back-off anew
POLL_S = 0.1
# A worker whose loop never goes round again holds up whoever the kernel gives to it. Counted in looks, not in seconds:
# a machine that was suspended accuses nobody.
HUNG_LOOKS = 100
KILL_AFTER_S = 5.0  # beyond the grace that the child was given
PROCESS_LOG = Log()


class CannotStart(Exception):
    """One sentence for the operator: what is wrong and what to do."""


def open_listener(address: str, flag: str, reuse_port: bool = False) -> socket.socket:
    """A bound socket for `HOST:PORT`, listening.

    Raises: `CannotStart` naming the flag.
    """
    host, port = split_address(address, flag)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse_port:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
        listener.listen(4096)
    except OSError as error:
        listener.close()
        raise CannotStart(f"cannot listen on {address}: {error.strerror}; choose another address with {flag}") from None
    listener.setblocking(False)
    return listener


def open_listeners(address: str, flag: str, count: int) -> list[socket.socket]:
    """One socket for each worker on one port; the kernel spreads connections over them.

    Raises: `CannotStart`.
    """
    host, port = split_address(address, flag)
    # Without SO_REUSEPORT first: with it, a port that another program of ours shares would look free.
    if port:
        open_listener(address, flag).close()
    first = open_listener(address, flag, reuse_port=True)
    bound = f"[{host}]:{first.getsockname()[1]}" if ":" in host else f"{host}:{first.getsockname()[1]}"
    return [first, *(open_listener(bound, flag, reuse_port=True) for _ in range(count - 1))]


def split_address(address: str, flag: str) -> tuple[str, int]:
    """`HOST:PORT` in parts.

    Raises: `CannotStart` naming the flag.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not port.isdigit() or int(port) > 65535:
        raise CannotStart(f"{flag} {address!r} is not HOST:PORT with a port from 0 to 65535")
    return host, int(port)


def shared_memory(workers: int) -> tuple[int, SharedMemory]:
    """The board's memory: a descriptor that children inherit, and this process's own view."""
    size = SharedMemory.bytes_needed(workers)
    fd = os.memfd_create("fleetgate-board") if hasattr(os, "memfd_create") else _unlinked_file()
    os.ftruncate(fd, size)
    os.set_inheritable(fd, True)
    return fd, SharedMemory(memoryview(mmap.mmap(fd, size)), workers)


def _unlinked_file() -> int:
    fd, path = tempfile.mkstemp(prefix="fleetgate-board-")
    Path(path).unlink()
    return fd


class Supervisor:
    """Keeps children running until it is told to stop, then stops them in order and waits.

    Shape: with a `renewal`, SIGHUP replaces the processes while they run; `listeners` are what clients connect to.
    """

    def __init__(
        self,
        children: list[ChildProcess],
        board: SharedMemory,
        grace_s: float,
        say: Callable[[str], None],
        renewal: UpgradeHooks | None = None,
        listeners: Sequence[socket.socket] = (),
    ) -> None:
        self._board = board
        self._grace_s = grace_s
        self._say = say
        self._listeners = listeners
        self._can_upgrade = renewal is not None
        renewal = renewal or UpgradeHooks(lambda generation: [], say)
        hands = ProcessControl(renewal.workers_of, self._start, _retire, _kill, renewal.tell)
        self._workers = RollingUpgrade(board, [child for child in children if child.worker >= 0], hands)
        self._others = [child for child in children if child.worker < 0]
        self._stopping = False
        self._awake, self._waker = socket.socketpair()

    def run(self) -> int:
        """Run until stopped; the exit code."""
        self._take_signals()
        now_s = time.monotonic()
        for child in (*self._workers.serving, *self._others):
            self._start(child, now_s)
        failed = 0
        while not failed and not self._stopping:
            self._sleep()
            now_s = time.monotonic()
            for child in (*self._workers.serving, *self._others):
                failed = failed or self._look(child, now_s)
            if self._workers.look(now_s):
                for child in self._others:  # last: what workers of this version ask of the store is there by now
                    self._renew(child)
        self._stop_all()
        return failed

    def _take_signals(self) -> None:
        """Signals end `_sleep`; what they ask for is done outside their handlers, where nothing can be half done."""
        for end in (self._awake, self._waker):
            end.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)

    def _sleep(self) -> None:
        if not select.select([self._awake], [], [], POLL_S)[0]:
            return
        for number in self._awake.recv(4096):
            if number in (signal.SIGTERM, signal.SIGINT):
                self._stopping = True
            elif number == signal.SIGHUP and self._can_upgrade:
                self._workers.ask()

    def _start(self, child: ChildProcess, now_s: float) -> None:
        for fd in child.fds:
            os.set_inheritable(fd, True)
        if child.worker >= 0:
            starts = self._board.get(child.worker, WorkerCell.STARTS)
            self._board.set(child.worker, WorkerCell.STARTS, starts + 1)
            self._board.set(child.worker, WorkerCell.DUTY, 1)  # before it runs: others must count with it when it does
        # A process group of its own: Ctrl-C in a terminal reaches the supervisor, which drains the children.
        child.process = subprocess.Popen(  # noqa: S603 - our own interpreter and modules
            child.argv, env={**os.environ, **child.env}, pass_fds=child.fds, start_new_session=True
        )
        child.started_s = now_s

    def _look(self, child: ChildProcess, now_s: float) -> int:
        """Start a child again when its time has come; the exit code when that makes no sense."""
        process = child.process
        if process is None:
            if now_s >= child.start_at_s:
                self._start(child, now_s)
            return 0
        code = process.poll()
        if code is None:
            if self._is_hung(child):
                self._say(f"{child.name} stood still for {HUNG_LOOKS * POLL_S:.0f} s and is killed")
                process.kill()
            return 0
        child.process = None
        if child.renewing:
            child.renewing = False
            self._start(child, now_s)
            return 0
        ran_s = now_s - child.started_s
        first = child.essential and child.restarts_in_a_row == 0 and ran_s < STEADY_S and code > 0
        if first:
            return code
        child.restarts_in_a_row = 0 if ran_s > STEADY_S else child.restarts_in_a_row + 1
        pause_s = min(RESTART_MAX_S, RESTART_FIRST_S * 2 ** max(0, child.restarts_in_a_row - 1))
        child.start_at_s = now_s + pause_s
        swept = self._board.clear_worker(child.worker) if child.worker >= 0 else 0
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        held = f"; {swept} reservations given back" if child.worker >= 0 else ""
        self._say(f"{child.name} ended ({how}){held}; starting it again in {pause_s:.1f} s")
        return 0

    def _is_hung(self, child: ChildProcess) -> bool:
        if child.worker < 0 or not self._board.get(child.worker, WorkerCell.ACCEPTING):
            child.still = 0
            return False
        beat = self._board.get(child.worker, WorkerCell.HEARTBEAT_MS)
        child.still = child.still + 1 if beat == child.beat else 0
        child.beat = beat
        return child.still >= HUNG_LOOKS

    def _renew(self, child: ChildProcess) -> None:
        """End a process that has no successor beside it, to start it with the code and the file on disk."""
        self._board.control_plane[ControlPlaneCell.CONFIGURED] = 0
        child.essential = False  # bad code must not end what serves
        if child.process is not None:
            child.renewing = True
            child.process.terminate()

    def _stop_all(self) -> None:
        """Workers first, so that answers end while the control process still shows them."""
        # From here on the workers hold the last ends of the sockets: who connects after they close is refused at once,
        # rather than left in a queue that nobody will look at.
        for listener in self._listeners:
            listener.close()
        for group in (self._workers.everyone, self._others):
            for child in group:
                if child.process is not None:
                    child.process.terminate()
            deadline_s = time.monotonic() + self._grace_s + KILL_AFTER_S
            for child in group:
                if child.process is not None:
                    self._wait_or_kill(child.process, deadline_s)

    @staticmethod
    def _wait_or_kill(process: subprocess.Popen[bytes], deadline_s: float) -> None:
        try:
            process.wait(max(0.1, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _retire(child: ChildProcess) -> None:
    if child.process is not None:
        child.process.send_signal(RETIRE)


def _kill(child: ChildProcess) -> None:
    process, child.process = child.process, None
    if process is not None and process.poll() is None:
        process.kill()
        process.wait()


def say_json(message: str) -> None:
    """A line of the supervisor's own log."""
    PROCESS_LOG.info("supervisor", message)
