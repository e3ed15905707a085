"""Slots: the small numbers under which shared memory keeps an object, given once and used again as a last resort."""

from collections.abc import Iterable, Mapping

from sqlalchemy import Connection, select, update

from fleetgate.control.store.schema import slots
from fleetgate.core.model import DEPLOYMENTS_MAX, ENDPOINTS_MAX, GATEWAYS_MAX

SPACES: Mapping[str, int] = {
    "deployment": DEPLOYMENTS_MAX,
    "endpoint": ENDPOINTS_MAX,
    "gateway": GATEWAYS_MAX,
}


def assign(connection: Connection, space: str, owners: Iterable[str]) -> dict[str, int]:
    """The slots of exactly these owners; those of others become free.

    An owner keeps its slot. A new one gets the lowest number never used, so that counts left over from another cannot
    be taken for its own; when every number was used, the one that has been free for longest. Owners that find no slot
    are missing in the answer.
    """
    wanted = list(dict.fromkeys(owners))
    rows = connection.execute(select(slots.c.slot, slots.c.owner, slots.c.freed).where(slots.c.space == space)).all()
    held = {row.owner: row.slot for row in rows if row.freed == 0}
    turn = max((row.freed for row in rows), default=0) + 1
    gone = [slot for owner, slot in held.items() if owner not in set(wanted)]
    for offset, slot in enumerate(sorted(gone)):
        connection.execute(
            update(slots).where(slots.c.space == space, slots.c.slot == slot).values(freed=turn + offset)
        )
    never_used = iter(range(len(rows), SPACES[space]))  # numbers are given in order, so the next is the count so far
    freed = sorted((row.freed, row.slot) for row in rows if row.freed)
    longest_free = iter([slot for _, slot in freed] + sorted(gone))
    given: dict[str, int] = {}
    for owner in wanted:
        if owner in held:
            given[owner] = held[owner]
        elif (slot := next(never_used, None)) is not None:
            connection.execute(slots.insert().values(space=space, slot=slot, owner=owner, freed=0))
            given[owner] = slot
        elif (slot := next(longest_free, None)) is not None:
            connection.execute(
                update(slots).where(slots.c.space == space, slots.c.slot == slot).values(owner=owner, freed=0)
            )
            given[owner] = slot
    return given
