"""`Idempotency-Key`: a request that a client repeats is processed once. faults.md row 43.

A claim is a locked file, named by API key, Gateway and idempotency key, so that all workers of a machine see it and a
worker's end frees it. Nothing is kept in memory, and requests without the header cost nothing.
Source: draft-ietf-httpapi-idempotency-key-header.
"""

import fcntl
import os
import time
from hashlib import sha256
from pathlib import Path

import msgspec

from fleetgate.protocols import error_codes as errors
from fleetgate.proxy.downstream.local_responses import RequestRejected
from fleetgate.proxy.overload.notices import OperatorNotices
from fleetgate.proxy.request.request_context import FinalResponse, RequestContext

DIRECTORY = "idempotency"
KEPT_S = 86_400.0
ANSWER_BYTES_MAX = 64 * 1024
NAME_BYTES_MAX = 255
FILES_MAX = 20_000
BYTES_MAX = 256 * 1024 * 1024
RUNNING, WHOLE, STREAM, LARGE = "running", "whole", "stream", "large"
_HEAD_BYTES_MAX = 64 * 1024  # of a file: the first line, with the kept headers


class _Kept(msgspec.Struct):
    """The first line of a claim's file; the kept response's body follows it."""

    print: str
    state: str
    headers: bytes = b""


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Kept).decode


class IdempotentReplay(msgspec.Struct, frozen=True):
    """The kept response to an earlier request. Shape: `headers` are whole lines."""

    headers: bytes
    body: bytes


class IdempotencyClaim:
    """A claim on an idempotency key, held until the request is answered."""

    __slots__ = ("_fd", "_path", "_print")

    def __init__(self, fd: int, path: Path, fingerprint: str) -> None:
        self._fd = fd
        self._path = path
        self._print = fingerprint
        self._write(_Kept(fingerprint, RUNNING), b"")

    def end(self, response: FinalResponse) -> None:
        """Keep the response, or only that there was one, before the client has all of it.

        A request that failed may be sent again.
        """
        try:
            if not response.ok:
                self._path.unlink(missing_ok=True)
            elif response.stream:
                self._write(_Kept(self._print, STREAM), b"")
            elif response.size_bytes > ANSWER_BYTES_MAX:
                self._write(_Kept(self._print, LARGE), b"")
            else:
                self._write(_Kept(self._print, WHOLE, response.headers), response.body or b"")
        except OSError:
            self._path.unlink(missing_ok=True)  # a full disk: a repeated request is then processed again
        finally:
            self._close()

    def _write(self, kept: _Kept, body: bytes) -> None:
        data = _encode(kept) + b"\n" + body
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, data, 0)

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        # After an internal error the request is dropped without an end: this frees the lock and with it the claim.
        self._close()


class IdempotencyStore:
    """The claims of one machine. Shape: one file each in `DATA_DIR/idempotency`."""

    def __init__(self, data_dir: Path, notices: OperatorNotices) -> None:
        self._directory = data_dir / DIRECTORY
        self._notices = notices

    def claim(self, context: RequestContext, body: bytes) -> IdempotencyClaim | IdempotentReplay | None:
        """Claim the key. Returns the claim, the kept response, or None if the disk fails. faults.md row 68.

        Raises: `RequestRejected` with 400 for an invalid key, 409 while another request has the claim or if its
        response was not kept, 422 if the key was used for another request. Cost: 60 µs, only with the header.
        """
        name = context.idempotency_key
        if len(name) > NAME_BYTES_MAX or not name.isascii():
            raise RequestRejected(*errors.INVALID_IDEMPOTENCY_KEY.filled(bytes_max=NAME_BYTES_MAX))
        owner = f"{context.gateway.spec.name}\0{context.key.id or context.key.name}\0".encode()
        path = self._directory / sha256(owner + name).hexdigest()
        try:
            return _claim(path, sha256(context.path + b"\0" + body).hexdigest())
        except OSError as error:
            message = f"{path.parent} cannot be used ({error.strerror}): Idempotency-Key has no effect"
            self._notices.emit("idempotency", message)
            return None

    def remove_expired(self) -> None:
        """Remove expired files, and the oldest beyond the limits. It reads a directory: call it in a thread."""
        remove_expired(self._directory.parent)


def _claim(path: Path, fingerprint: str) -> IdempotencyClaim | IdempotentReplay:
    fd = _open(path)
    if fd < 0:
        raise RequestRejected(*errors.IDEMPOTENCY_KEY_BUSY.filled(), extra=b"retry-after: 1\r\n")
    try:
        found = _read(fd)
        if found is None:
            return IdempotencyClaim(os.dup(fd), path, fingerprint)
        kept, answer = found
        if kept.print != fingerprint:
            raise RequestRejected(*errors.IDEMPOTENCY_KEY_REUSED.filled())
        if kept.state == WHOLE:
            return IdempotentReplay(kept.headers, answer)
        error = errors.IDEMPOTENCY_KEY_OF_A_STREAM if kept.state == STREAM else errors.IDEMPOTENCY_KEY_TOO_LARGE
        raise RequestRejected(*error.filled(kib=ANSWER_BYTES_MAX // 1024), extra=_FOR_GOOD)
    finally:
        os.close(fd)


_FOR_GOOD = b"x-should-retry: false\r\n"  # the official SDKs would retry twice


def _open(path: Path) -> int:
    """Open and lock the file; -1 if another request has the lock."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return -1
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # it was removed in between


def _read(fd: int) -> tuple[_Kept, bytes] | None:
    """The content of a claim's file; None if it is empty, expired or unfinished because its worker ended."""
    if time.time() - os.fstat(fd).st_mtime > KEPT_S:
        return None
    line, _, answer = os.pread(fd, _HEAD_BYTES_MAX + ANSWER_BYTES_MAX, 0).partition(b"\n")
    try:
        kept = _decode(line)
    except msgspec.MsgspecError:
        return None
    return (kept, answer) if kept.state != RUNNING else None


def remove_expired(data_dir: Path) -> None:
    """Remove expired files, and the oldest beyond the limits. It reads a directory: call it in a thread."""
    found = []
    try:
        with os.scandir(data_dir / DIRECTORY) as entries:
            for entry in entries:
                stat = entry.stat()
                found.append((stat.st_mtime, stat.st_size, entry.path))
    except OSError:
        return
    found.sort(reverse=True)
    total_bytes, oldest_s = 0, time.time() - KEPT_S
    for number, (at_s, size_bytes, path) in enumerate(found):
        total_bytes += size_bytes
        if at_s < oldest_s or number >= FILES_MAX or total_bytes > BYTES_MAX:
            Path(path).unlink(missing_ok=True)
