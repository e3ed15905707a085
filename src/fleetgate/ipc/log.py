"""The log of a process: JSON lines with levels, written by a thread so that a slow reader blocks no event loop."""

import atexit
import logging
import os
import queue
import select
import sys
import threading
import time
import traceback
from enum import IntEnum
from types import TracebackType

import msgspec

LEVEL_ENV = "FLEETGATE_LOG_LEVEL"
BACKLOG_BYTES_MAX = 1024 * 1024  # about 5,000 lines
DRAIN_S_MAX = 1.0
STDERR = 2


class Level(IntEnum):
    """Levels, with the numbers of the standard library."""

    DEBUG = logging.DEBUG
    INFO = logging.INFO
    WARNING = logging.WARNING
    ERROR = logging.ERROR


def log_line(level: Level, event: str, message: str, **fields: object) -> bytes:
    """One line. Shape: `fields` are between `event` and `message`; a field that is an empty string is left out."""
    shown = {name: value for name, value in fields.items() if value != ""}
    at_ms = int(time.time() * 1000)
    line = {"at_ms": at_ms, "level": level.name.lower(), "event": event, **shown, "message": message}
    return msgspec.json.encode(line, enc_hook=str) + b"\n"


class LineWriter:
    """Writes blocks of lines to a descriptor from a thread.

    Shape: lines beyond the backlog are dropped and counted; the thread starts with the first block. Cost: 2 µs a block.
    """

    def __init__(self, fd: int, backlog_bytes_max: int = BACKLOG_BYTES_MAX) -> None:
        self.dropped = 0
        self._fd = fd
        self._backlog_bytes_max = backlog_bytes_max
        self._backlog_bytes = 0
        self._queue: queue.SimpleQueue[bytes | threading.Event] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of the two counts; never held during a write
        self._thread: threading.Thread | None = None

    def write(self, block: bytes) -> None:
        """Hand over whole lines. Never waits, and may be called from any thread."""
        with self._lock:
            if self._backlog_bytes + len(block) > self._backlog_bytes_max:
                self.dropped += block.count(b"\n")
                return
            self._backlog_bytes += len(block)
            if self._thread is None or not self._thread.is_alive():  # not after a fork
                self._thread = threading.Thread(target=self._write_all, name="log-writer", daemon=True)
                self._thread.start()
        self._queue.put(block)

    def drain(self) -> None:
        """Wait until every block is written, at most a second."""
        if self._thread is not None:
            written = threading.Event()
            self._queue.put(written)
            written.wait(DRAIN_S_MAX)

    def _write_all(self) -> None:
        while True:
            block = self._queue.get()
            if isinstance(block, threading.Event):
                block.set()
                continue
            try:
                self._write(block)
            except OSError:  # the disk is full or the reader is gone: drop log lines, keep serving
                with self._lock:
                    self.dropped += block.count(b"\n")
            with self._lock:
                self._backlog_bytes -= len(block)

    def _write(self, block: bytes) -> None:
        view = memoryview(block)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:  # another process with the same terminal or pipe made it non-blocking
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()


class Log:
    """The structured log of one process.

    Shape: `fields` (such as `worker`) are in every line; lines below the level of `FLEETGATE_LOG_LEVEL` (debug, info,
    warning, error; info by default) are left out.
    """

    def __init__(self, writer: LineWriter | None = None, **fields: object) -> None:
        self.writer = writer or LineWriter(STDERR)
        self._fields = fields
        self._level_min = Level.__members__.get(os.environ.get(LEVEL_ENV, "").upper(), Level.INFO)
        if writer is None:
            atexit.register(self.drain)

    @property
    def dropped(self) -> int:
        """Lines that were not written."""
        return self.writer.dropped

    def debug(self, event: str, message: str, **fields: object) -> None:
        """Log details for the development of Fleetgate."""
        self.write(Level.DEBUG, event, message, **fields)

    def info(self, event: str, message: str, **fields: object) -> None:
        """Log a change of state."""
        self.write(Level.INFO, event, message, **fields)

    def warning(self, event: str, message: str, **fields: object) -> None:
        """Log a state that an operator should look at; requests are still served."""
        self.write(Level.WARNING, event, message, **fields)

    def error(self, event: str, message: str, **fields: object) -> None:
        """Log a failure that lost or refused something."""
        self.write(Level.ERROR, event, message, **fields)

    def write(self, level: Level, event: str, message: str, **fields: object) -> None:
        """Log at a level. Shape: `id` is the request id."""
        if level >= self._level_min:
            self.writer.write(log_line(level, event, message, **self._fields, **fields))

    def drain(self) -> None:
        """Wait until every line is written, at most a second."""
        self.writer.drain()

    def take_over(self) -> None:
        """Send the lines of `logging` from WARNING on here, and the traceback of an exception that ends the process."""
        logging.basicConfig(level=logging.WARNING, handlers=[_LogHandler(self)], force=True)
        sys.excepthook = self._on_crash

    def _on_crash(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self.error("crash", "".join(traceback.format_exception(kind, error, trace)).rstrip())
        self.drain()


class _LogHandler(logging.Handler):
    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        level = max(each for each in Level if each <= max(record.levelno, Level.DEBUG))
        message = record.getMessage()
        if record.exc_info and record.exc_info[0] is not None:
            message += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
        self._log.write(level, record.name, message)
