"""The supervisor: starts the workers and the control process, restarts those that end, and stops them in order.

It serves no request. The listening sockets and the shared memory belong to it, so they outlive a worker: when a worker
dies, connections in the backlog are not reset.
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
STEADY_S = 30.0  # after a run of this length, the restart pause is RESTART_FIRST_S again
FAILURES_REPORTED = 3  # one end in less than STEADY_S may be chance, three in a row are a fault for the operator
POLL_S = 0.1
# The kernel keeps giving connections to a worker with a stuck event loop, so such a worker is killed. The limit is
# counted in polls, not in seconds, because the supervisor of a suspended machine does not poll either.
HUNG_POLLS = 100
KILL_AFTER_S = 5.0  # on top of the grace that a child was given
PROCESS_LOG = Log()


def create_shared_memory(workers: int) -> tuple[int, SharedMemory]:
    """Create the shared memory: a descriptor that children inherit, and this process's own view."""
    size = SharedMemory.bytes_needed(workers)
    fd = os.memfd_create("fleetgate-shared-memory") if hasattr(os, "memfd_create") else _unlinked_file()
    os.ftruncate(fd, size)
    os.set_inheritable(fd, True)
    return fd, SharedMemory(memoryview(mmap.mmap(fd, size)), workers)


def _unlinked_file() -> int:
    fd, path = tempfile.mkstemp(prefix="fleetgate-shared-memory-")
    Path(path).unlink()
    return fd


class Supervisor:
    """Keeps children running until a signal stops it; then it stops them in order and waits.

    Shape: with `hooks`, SIGHUP replaces the processes while they serve; `listeners` are the sockets of clients.
    """

    def __init__(
        self,
        children: list[ChildProcess],
        shared_memory: SharedMemory,
        grace_s: float,
        log: Callable[[str], None],
        hooks: UpgradeHooks | None = None,
        listeners: Sequence[socket.socket] = (),
    ) -> None:
        self._shared_memory = shared_memory
        self._grace_s = grace_s
        self._log = log
        self._listeners = listeners
        self._can_upgrade = hooks is not None
        hooks = hooks or UpgradeHooks(lambda generation: [], log)
        self._emit_event = hooks.emit_event
        control = ProcessControl(hooks.workers_of, self._start, _retire, _kill, hooks.emit_event)
        self._workers = RollingUpgrade(shared_memory, [child for child in children if child.worker >= 0], control)
        self._others = [child for child in children if child.worker < 0]
        self._stopping = False
        self._wake_read, self._wake_write = socket.socketpair()

    def run(self) -> int:
        """Run until stopped, and return the exit code."""
        self._take_signals()
        now_s = time.monotonic()
        for child in (*self._workers.serving, *self._others):
            self._start(child, now_s)
        failed = 0
        while not failed and not self._stopping:
            self._sleep()
            now_s = time.monotonic()
            for child in (*self._workers.serving, *self._others):
                failed = failed or self._poll_child(child, now_s)
            if self._workers.poll(now_s):
                # Only now: code with which the workers do not start must not replace the control process either.
                for child in self._others:
                    self._replace(child)
        self._stop_all()
        return failed

    def _take_signals(self) -> None:
        """Let signals end `_sleep`; it acts on them outside the handlers, where no other work is half done."""
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)

    def _sleep(self) -> None:
        if not select.select([self._wake_read], [], [], POLL_S)[0]:
            return
        for number in self._wake_read.recv(4096):
            if number in (signal.SIGTERM, signal.SIGINT):
                self._stopping = True
            elif number == signal.SIGHUP and self._can_upgrade:
                self._workers.request()

    def _start(self, child: ChildProcess, now_s: float) -> None:
        for fd in child.fds:
            os.set_inheritable(fd, True)
        if child.worker >= 0:
            starts = self._shared_memory.get(child.worker, WorkerCell.STARTS)
            self._shared_memory.set(child.worker, WorkerCell.STARTS, starts + 1)
            # Set before it runs: from its first request on, the other workers must count with it.
            self._shared_memory.set(child.worker, WorkerCell.DUTY, 1)
        # A session of its own: Ctrl-C in a terminal reaches the supervisor only, which drains the children.
        child.process = subprocess.Popen(  # noqa: S603 - Fleetgate's own interpreter and modules
            child.argv, env={**os.environ, **child.env}, pass_fds=child.fds, start_new_session=True
        )
        child.started_s = now_s

    def _poll_child(self, child: ChildProcess, now_s: float) -> int:
        """Restart a child when its pause is over. Return its exit code if `fleetgate up` must exit, else 0."""
        process = child.process
        if process is None:
            if now_s >= child.start_at_s:
                self._start(child, now_s)
            return 0
        code = process.poll()
        if code is None:
            if self._is_hung(child):
                self._log(f"{child.name} has not moved for {HUNG_POLLS * POLL_S:.0f} s; it is killed and restarted")
                process.kill()
            return 0
        child.process = None
        if child.restart_on_exit:
            child.restart_on_exit = False
            self._start(child, now_s)
            return 0
        ran_s = now_s - child.started_s
        if child.essential and child.restarts_in_a_row == 0 and ran_s < STEADY_S and code > 0:
            return code
        self._schedule_restart(child, code, now_s)
        return 0

    def _schedule_restart(self, child: ChildProcess, code: int, now_s: float) -> None:
        child.restarts_in_a_row = 0 if now_s - child.started_s > STEADY_S else child.restarts_in_a_row + 1
        pause_s = min(RESTART_MAX_S, RESTART_FIRST_S * 2 ** max(0, child.restarts_in_a_row - 1))
        child.start_at_s = now_s + pause_s
        freed = self._shared_memory.clear_worker(child.worker) if child.worker >= 0 else 0
        cause = f"signal {-code}" if code < 0 else f"exit code {code}"
        reservations = f"; its {freed} reservations are freed" if child.worker >= 0 else ""
        self._log(f"{child.name} ended ({cause}){reservations}; restart in {pause_s:.1f} s")
        if child.restarts_in_a_row == FAILURES_REPORTED:
            self._emit_event(
                f"{child.name} ended {FAILURES_REPORTED} times in a row within {STEADY_S:.0f} s of its start, last "
                f"with {cause}; restarts go on, {RESTART_MAX_S:.0f} s apart at most; find the reason in the log of "
                "`fleetgate up`"
            )

    def _is_hung(self, child: ChildProcess) -> bool:
        if child.worker < 0 or not self._shared_memory.get(child.worker, WorkerCell.ACCEPTING):
            child.polls_without_heartbeat = 0
            return False
        heartbeat = self._shared_memory.get(child.worker, WorkerCell.HEARTBEAT_MS)
        child.polls_without_heartbeat = child.polls_without_heartbeat + 1 if heartbeat == child.heartbeat else 0
        child.heartbeat = heartbeat
        return child.polls_without_heartbeat >= HUNG_POLLS

    def _replace(self, child: ChildProcess) -> None:
        """End a process of which only one may run, to start it with the code and the configuration on disk."""
        self._shared_memory.control_plane[ControlPlaneCell.CONFIGURED] = 0
        child.essential = False  # if the new code does not start, the workers must go on
        if child.process is not None:
            child.restart_on_exit = True
            child.process.terminate()

    def _stop_all(self) -> None:
        """Stop the workers first, so that the control process shows their last requests."""
        # Then only workers hold the sockets: a connection after they close is refused at once. In the backlog of a
        # socket that no process accepts from, it would wait.
        for listener in self._listeners:
            listener.close()
        for group in (self._workers.all_workers, self._others):
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


def write_log(message: str) -> None:
    """Write one line of the supervisor's own log."""
    PROCESS_LOG.info("supervisor", message)
