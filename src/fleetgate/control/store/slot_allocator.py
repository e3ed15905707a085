"""Slots: the indexes of objects in shared memory. A freed slot is reused only when no unused slot is left."""

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
    """Assign a slot to each owner and free the slots of all other owners.

    An owner keeps its slot. A new owner gets the lowest slot that was never used, so that it does not inherit counts
    of another owner. If every slot was used it gets the one that has been free for the longest time. The result lacks
    the owners for which no slot is left.
    """
    wanted = list(dict.fromkeys(owners))
    rows = connection.execute(select(slots.c.slot, slots.c.owner, slots.c.freed).where(slots.c.space == space)).all()
    held = {row.owner: row.slot for row in rows if row.freed == 0}
    turn = max((row.freed for row in rows), default=0) + 1
    released = [slot for owner, slot in held.items() if owner not in set(wanted)]
    for offset, slot in enumerate(sorted(released)):
        connection.execute(
            update(slots).where(slots.c.space == space, slots.c.slot == slot).values(freed=turn + offset)
        )
    never_used = iter(
        range(len(rows), SPACES[space])
    )  # slots are assigned in order, so the next one is the count of rows
    freed = sorted((row.freed, row.slot) for row in rows if row.freed)
    longest_free = iter([slot for _, slot in freed] + sorted(released))
    assigned: dict[str, int] = {}
    for owner in wanted:
        if owner in held:
            assigned[owner] = held[owner]
        elif (slot := next(never_used, None)) is not None:
            connection.execute(slots.insert().values(space=space, slot=slot, owner=owner, freed=0))
            assigned[owner] = slot
        elif (slot := next(longest_free, None)) is not None:
            connection.execute(
                update(slots).where(slots.c.space == space, slots.c.slot == slot).values(owner=owner, freed=0)
            )
            assigned[owner] = slot
    return assigned
