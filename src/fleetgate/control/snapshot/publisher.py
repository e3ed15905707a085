"""Publishing: what the store says becomes the Snapshot file, whenever that changes and only then."""

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

DEBOUNCE_S = 0.005  # several changes made at once become one Snapshot
RETRY_S = 1.0
VERSION = "snapshot_version"
ReadyUrls = Callable[[], Mapping[str, tuple[str, ...]]]

log = structlog.get_logger()


class Publisher:
    """Keeps the Snapshot file equal to the store. `ready` gives the base URLs of managed Deployments' replicas.

    Shape: `refusal` says why what is stored now is not published, empty when it is; `in_use` gives the newest version
    that a worker uses.
    """

    def __init__(self, database: Database, data_dir: DataDir, egress_allow: Sequence[str], ready: ReadyUrls) -> None:
        self._database = database
        self._data_dir = data_dir
        self._egress_allow = tuple(egress_allow)
        self._ready = ready
        self._asked = 0
        self._done = 0
        self._wake = asyncio.Event()
        self._settled = asyncio.Condition()
        self.current: Snapshot | None = self._read(data_dir.snapshot)
        self.refusal = ""
        self.in_use: Callable[[], int] = lambda: 0
        self.managed: tuple[ManagedDeployment, ...] = ()
        self._credentials: dict[str, str] = {}

    @property
    def version(self) -> int:
        """The version of the Snapshot that lies on disk, 0 before the first."""
        return self.current.version if self.current else 0

    def poke(self) -> None:
        """Something changed; look soon. Called from the event loop."""
        self._asked += 1
        self._wake.set()

    async def settle(self) -> int:
        """Wait until everything that is stored now is published, and say the version."""
        self.poke()
        asked = self._asked
        async with self._settled:
            await self._settled.wait_for(lambda: self._done >= asked)
        return self.version

    async def run(self, on_managed: Callable[[], None]) -> None:
        """Publish whenever poked, and tell when what we keep running is another; after a failure try again."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(DEBOUNCE_S)
            self._wake.clear()
            asked, managed = self._asked, self.managed
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
                self._done = asked
                self._settled.notify_all()

    def load_managed(self) -> tuple[ManagedDeployment, ...]:
        """What we keep running, as the store has it."""
        with self._database.read() as connection:
            self.managed = managed_of(snapshot_parts(rows.load_resources(connection)))
        return self.managed

    def publish(self) -> bool:
        """Write the Snapshot if it says something new, and tell whether it did.

        Raises: `DataDirUnusable` when the disk does not take it; the old Snapshot then stays whole.
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
            if not self._may(self._against(built, number)):
                return False
            if self.current is not None and same_but_for_version(built, self.current):
                return False
            # The number is kept before the file is written: after a crash in between, a version is skipped, never
            # given twice. Proxies take no lower one, so it is above all that they may have seen from a lost store.
            version = max(number, self.version, self._kept_version(), self.in_use()) + 1
            rows.save_number(connection, VERSION, version)
        snapshot = msgspec.structs.replace(built, version=version, made_at_s=time.time())
        payload = encode_snapshot(snapshot)
        if not self._may(self._too_large(len(payload))):
            return False
        try:
            write_whole(self._data_dir.snapshot, sign(payload, self._data_dir.signing_key))
        except OSError as error:
            raise DataDirUnusable(unusable_sentence(self._data_dir.path, error)) from error
        self.current = snapshot
        log.info("published", version=version)
        return True

    def _may(self, refusal: str) -> bool:
        self.refusal = refusal
        if refusal:
            log.error("not_published", reason=refusal)
        return not refusal

    def _too_large(self, size_bytes: int) -> str:
        if size_bytes <= SNAPSHOT_BYTES_MAX:
            return ""
        return (
            f"the Snapshot would have {size_bytes} bytes and proxies take {SNAPSHOT_BYTES_MAX} at most; "
            f"version {self.version} stays in use: delete keys or Deployments that nobody needs"
        )

    def _against(self, built: Snapshot, number: int) -> str:
        """Why this must not be published, empty when it may: an empty store that is not the one we published from."""
        served = self.current or self._read(self._data_dir.last_good_snapshot)
        if built.gateways or served is None or not served.gateways or number >= served.version:
            return ""
        return (
            f"the store has no Gateway and never published version {served.version}, which the proxies serve: it is "
            f"another or a new one, so they stay with {served.version}; put {self._data_dir.database} back, or apply "
            "the fleet's file again"
        )

    def _credential(self, sealed: Mapping[str, str], deployment: str, secret: str) -> str:
        """A Secret sealed again for one Deployment; the same text as before while the value is the same."""
        try:
            value = unseal(sealed.get(secret, ""), self._data_dir.seal_key, secret)
        except UnsealFailed:
            log.error(
                "secret_unreadable", secret=secret, fix="put seal.key back from a backup or apply the Secret again"
            )
            return ""
        before = self._credentials.get(deployment, "")
        try:
            if before and unseal(before, self._data_dir.seal_key, deployment) == value:
                return before
        except UnsealFailed:
            pass  # written under another key: sealed anew below
        return seal(value, self._data_dir.seal_key, deployment)

    def _kept_version(self) -> int:
        kept = self._read(self._data_dir.last_good_snapshot)
        return kept.version if kept else 0

    def _read(self, path: Path) -> Snapshot | None:
        try:
            return decode_snapshot(verified(path.read_bytes(), public_key(self._data_dir.signing_key)))
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, SignatureInvalid):
            return None  # unreadable or damaged: the store has everything, and the next version replaces it
