"""The publisher writes the Snapshot file when the stored resources change, and only then."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec
import structlog

from fleetgate.control.data_dir import DataDir, DataDirUnusable, unusable_sentence, write_whole
from fleetgate.control.snapshot.builder import build, keys_of, managed_of, same_but_for_version, snapshot_parts
from fleetgate.control.store import repository as rows
from fleetgate.control.store import slot_allocator as slots
from fleetgate.control.store.database import Database
from fleetgate.core.model import SNAPSHOT_BYTES_MAX, Snapshot, decode_snapshot, encode_snapshot
from fleetgate.ipc.sealed_secret import UnsealFailed, seal, unseal
from fleetgate.ipc.signed_file import SignatureInvalid, public_key, sign, verified
from fleetgate.providers.base import ManagedDeployment

DEBOUNCE_S = 0.005  # several changes at the same time become one Snapshot
RETRY_S = 1.0
VERSION = "snapshot_version"
ReadyUrls = Callable[[], Mapping[str, tuple[str, ...]]]

log = structlog.get_logger()


class Publisher:
    """Keeps the Snapshot file equal to the store.

    Shape: `ready` returns the base URLs of ready replicas by managed Deployment; `refusal` says why the stored state is
    not published, empty if it is; `newest_version_in_use` returns the newest version that a worker uses.
    """

    def __init__(self, database: Database, data_dir: DataDir, egress_allow: Sequence[str], ready: ReadyUrls) -> None:
        self._database = database
        self._data_dir = data_dir
        self._egress_allow = tuple(egress_allow)
        self._ready = ready
        self._requested = 0
        self._published = 0
        self._wake = asyncio.Event()
        self._settled = asyncio.Condition()
        self.current: Snapshot | None = self._read(data_dir.snapshot)
        self.refusal = ""
        self.newest_version_in_use: Callable[[], int] = lambda: 0
        self.managed: tuple[ManagedDeployment, ...] = ()
        self._credentials: dict[str, str] = {}

    @property
    def version(self) -> int:
        """The version of the Snapshot on disk, 0 before the first."""
        return self.current.version if self.current else 0

    def wake(self) -> None:
        """Publish soon, because something changed. To be called in the event loop's thread."""
        self._requested += 1
        self._wake.set()

    async def wait_published(self) -> int:
        """Wait until the stored state is published and return its version."""
        self.wake()
        requested = self._requested
        async with self._settled:
            await self._settled.wait_for(lambda: self._published >= requested)
        return self.version

    async def run(self, on_managed: Callable[[], None]) -> None:
        """Publish at each wake and call `on_managed` if the managed Deployments changed; retry after a failure."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(DEBOUNCE_S)
            self._wake.clear()
            requested, managed = self._requested, self.managed
            try:
                await asyncio.to_thread(self.publish)
            except DataDirUnusable as error:
                log.error("not_published", reason=str(error))
                await asyncio.sleep(RETRY_S)
                self._wake.set()
                continue
            if self.managed != managed:
                on_managed()
            async with self._settled:
                self._published = requested
                self._settled.notify_all()

    def load_managed(self) -> tuple[ManagedDeployment, ...]:
        """The managed Deployments in the store."""
        with self._database.read() as connection:
            self.managed = managed_of(snapshot_parts(rows.load_resources(connection)))
        return self.managed

    def publish(self) -> bool:
        """Write the Snapshot if it differs from the current one, and return whether it was written.

        Raises: `DataDirUnusable` if the file cannot be written; the old Snapshot then stays intact.
        """
        self._credentials = {one.name: one.credential for one in self.current.deployments} if self.current else {}
        with self._database.write() as connection:
            parts = snapshot_parts(rows.load_resources(connection))
            self.managed = managed_of(parts)
            sealed = rows.load_secrets(connection)
            built = build(parts, self._ready(), partial(slots.assign, connection), partial(self._credential, sealed))
            keys = keys_of(parts, rows.load_keys(connection))
            built = msgspec.structs.replace(built, keys=keys, egress_allow=self._egress_allow)
            number = rows.load_number(connection, VERSION)
            built = msgspec.structs.replace(built, emptied=not (built.gateways or parts.gateways))
            if not self._is_allowed(self._refuse_empty(built, number)):
                return False
            if self.current is not None and same_but_for_version(built, self.current):
                return False
            # The number is stored before the file is written, so a crash in between skips a version and never repeats
            # one. Proxies refuse a lower version, so it must exceed every version that a lost store may have published.
            version = max(number, self.version, self._last_good_version(), self.newest_version_in_use()) + 1
            rows.save_number(connection, VERSION, version)
        snapshot = msgspec.structs.replace(built, version=version, made_at_s=time.time())
        payload = encode_snapshot(snapshot)
        if not self._is_allowed(self._refuse_too_large(len(payload))):
            return False
        try:
            write_whole(self._data_dir.snapshot, sign(payload, self._data_dir.signing_key))
        except OSError as error:
            raise DataDirUnusable(unusable_sentence(self._data_dir.path, error)) from error
        self.current = snapshot
        log.info("published", version=version)
        return True

    def _is_allowed(self, refusal: str) -> bool:
        self.refusal = refusal
        if refusal:
            log.error("not_published", reason=refusal)
        return not refusal

    def _refuse_too_large(self, size_bytes: int) -> str:
        if size_bytes <= SNAPSHOT_BYTES_MAX:
            return ""
        return (
            f"the Snapshot would have {size_bytes} bytes, and proxies accept at most {SNAPSHOT_BYTES_MAX}; "
            f"version {self.version} stays in use: delete keys or Deployments that are not needed"
        )

    def _refuse_empty(self, built: Snapshot, number: int) -> str:
        """Why an empty Snapshot must not be published: the store is not the one that the current Snapshot came from."""
        served = self.current or self._read(self._data_dir.last_good_snapshot)
        if built.gateways or served is None or not served.gateways or number >= served.version:
            return ""
        return (
            f"the store has no Gateway and never published version {served.version}, which the proxies use: it is a "
            f"new or another store, so version {served.version} stays in use; restore {self._data_dir.database}, or "
            "apply the fleet's file again"
        )

    def _credential(self, sealed: Mapping[str, str], deployment: str, secret: str) -> str:
        """A Secret sealed for one Deployment. The sealed text stays the same while the value does."""
        try:
            value = unseal(sealed.get(secret, ""), self._data_dir.seal_key, secret)
        except UnsealFailed:
            log.error(
                "secret_unreadable", secret=secret, fix="restore seal.key from a backup or apply the Secret again"
            )
            return ""
        before = self._credentials.get(deployment, "")
        try:
            if before and unseal(before, self._data_dir.seal_key, deployment) == value:
                return before
        except UnsealFailed:
            pass  # sealed with another key: it is sealed again below
        return seal(value, self._data_dir.seal_key, deployment)

    def _last_good_version(self) -> int:
        last_good = self._read(self._data_dir.last_good_snapshot)
        return last_good.version if last_good else 0

    def _read(self, path: Path) -> Snapshot | None:
        try:
            return decode_snapshot(verified(path.read_bytes(), public_key(self._data_dir.signing_key)))
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, SignatureInvalid):
            return None  # unreadable or damaged: the next version, built from the store, replaces it
