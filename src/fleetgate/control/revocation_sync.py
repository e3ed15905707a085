"""Merge keys that were revoked on this machine without the control plane: delete them, then clear the list."""

import asyncio
from datetime import UTC, datetime

import structlog

from fleetgate.control.context import Control
from fleetgate.control.data_dir import DataDirUnusable
from fleetgate.control.resources.apply import ChangeOrigin
from fleetgate.control.store import repository as rows
from fleetgate.ipc.revocation_list import Revocation, read_revoked, remove_revocation
from fleetgate.ipc.signed_file import SignatureInvalid, public_key

POLL_EVERY_S = 1.0
log = structlog.get_logger()


async def merge_revoked(control: Control) -> None:
    """Merge the list once a second until cancelled."""
    last_error = ""
    while True:
        try:
            await _merge(control)
            last_error = ""
        except (SignatureInvalid, OSError, DataDirUnusable) as error:  # the list stays, and workers apply it
            if str(error) != last_error:
                last_error = str(error)
                log.error("revoked_not_merged", path=str(control.data_dir.revoked), reason=last_error)
        await asyncio.sleep(POLL_EVERY_S)


async def _merge(control: Control) -> None:
    data_dir = control.data_dir
    listed = read_revoked(data_dir.revoked, public_key(data_dir.signing_key))
    if not listed:
        return
    await asyncio.to_thread(_delete, control, listed)
    version = await control.publisher.wait_published()
    # Remove a key from the list only when every worker uses a Snapshot without it; earlier it would be valid again.
    if control.is_adopted(version):
        ids = {revocation.id for revocation in listed}
        await asyncio.to_thread(remove_revocation, data_dir.revoked, data_dir.signing_key, ids)


def _delete(control: Control, listed: tuple[Revocation, ...]) -> None:
    with control.database.read() as connection:
        names = {key.id: name for name, key in rows.load_keys(connection).items()}
    for revocation in listed:
        name = names.get(revocation.id)
        if name is not None:
            at = datetime.fromtimestamp(revocation.at_s, UTC).isoformat(timespec="seconds")
            reason = f"because it was revoked on the machine by {revocation.by} at {at}"
            control.writer.delete("Key", name, confirmed=True, origin=ChangeOrigin(reason))
