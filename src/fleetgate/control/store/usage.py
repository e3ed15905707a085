"""Usage in the store: rows of attempts, their sums by the hour, and the read offsets of the journals."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, delete, func, select
from sqlalchemy.dialects.sqlite import insert

from fleetgate.control.store.schema import usage_hours, usage_open, usage_read, usage_rows
from fleetgate.core.usage_record import OpenAttempt, UsageIntent, UsageProgress, UsageRow

ROWS_KEPT = 1_000_000
HOUR_MS = 3_600_000
NAMES = ("key", "gateway", "model", "deployment")
SUMS = ("attempts", "estimated", "prompt_tokens", "output_tokens", "billed_prompt_tokens", "billed_output_tokens")
_ROWS_AT_ONCE = 500  # SQLite takes 32,766 variables in one statement

_encode = msgspec.json.encode
_intent = msgspec.json.Decoder(UsageIntent).decode
_progress = msgspec.json.Decoder(UsageProgress).decode


def add_rows(connection: Connection, rows: Sequence[UsageRow]) -> int:
    """Write the rows that are not stored yet, add them to the sums, and return their number."""
    new: list[UsageRow] = []
    for at in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[at : at + _ROWS_AT_ONCE]
        wanted = usage_rows.c.attempt_id.in_([row.attempt_id for row in some])
        known = set(connection.execute(select(usage_rows.c.attempt_id).where(wanted)).scalars())
        for row in some:
            if row.attempt_id not in known:
                known.add(row.attempt_id)
                new.append(row)
    if not new:
        return 0
    connection.execute(usage_rows.insert(), [row._asdict() for row in new])
    sums: dict[tuple[Any, ...], list[int]] = {}
    for row in new:
        identity = (row.ended_ms // HOUR_MS, row.key, row.gateway, row.model, row.deployment)
        sum_ = sums.setdefault(identity, [0] * len(SUMS))
        amounts = (
            1,
            1 - row.exact,
            row.prompt_tokens,
            row.output_tokens,
            row.billed_prompt_tokens,
            row.billed_output_tokens,
        )
        sums[identity] = [before + amount for before, amount in zip(sum_, amounts, strict=True)]
    statement = insert(usage_hours)
    statement = statement.on_conflict_do_update(
        index_elements=["hour", *NAMES], set_={name: usage_hours.c[name] + statement.excluded[name] for name in SUMS}
    )
    keys = ("hour", *NAMES)
    values = [
        {**dict(zip(keys, identity, strict=True)), **dict(zip(SUMS, sum_, strict=True))}
        for identity, sum_ in sums.items()
    ]
    connection.execute(statement, values)
    return len(new)


def prune(connection: Connection) -> None:
    """Delete the oldest rows beyond `ROWS_KEPT`; their sums stay."""
    newest = connection.execute(select(func.max(usage_rows.c.id))).scalar() or 0
    connection.execute(delete(usage_rows).where(usage_rows.c.id <= newest - ROWS_KEPT))


def load_offsets(connection: Connection) -> dict[str, int]:
    """The read offset of each journal file."""
    return {row.file: row.offset for row in connection.execute(select(usage_read))}


def save_offsets(connection: Connection, offsets: Mapping[str, int], gone: Collection[str]) -> None:
    """Write the read offsets of files, and delete those of removed files."""
    if offsets:
        statement = insert(usage_read)
        statement = statement.on_conflict_do_update(index_elements=["file"], set_={"offset": statement.excluded.offset})
        connection.execute(statement, [{"file": file, "offset": offset} for file, offset in offsets.items()])
    if gone:
        connection.execute(delete(usage_read).where(usage_read.c.file.in_(gone)))


def load_open(connection: Connection) -> dict[str, list[OpenAttempt]]:
    """Attempts that are not settled, by the run of the worker that started them."""
    found: dict[str, list[OpenAttempt]] = {}
    for row in connection.execute(select(usage_open)):
        progress = _progress(row.progress) if row.progress else None
        found.setdefault(row.run, []).append(OpenAttempt(_intent(row.intent), progress))
    return found


def save_open(connection: Connection, run: str, changed: Iterable[OpenAttempt], settled: Collection[str]) -> None:
    """Write the open attempts, and delete the settled ones."""
    values = [
        {
            "attempt_id": one.intent.id,
            "run": run,
            "intent": _encode(one.intent).decode(),
            "progress": _encode(one.progress).decode() if one.progress is not None else "",
        }
        for one in changed
    ]
    if values:
        statement = insert(usage_open)
        statement = statement.on_conflict_do_update(
            index_elements=["attempt_id"], set_={"progress": statement.excluded.progress}
        )
        connection.execute(statement, values)
    gone = list(settled)
    for at in range(0, len(gone), _ROWS_AT_ONCE):
        connection.execute(delete(usage_open).where(usage_open.c.attempt_id.in_(gone[at : at + _ROWS_AT_ONCE])))


def load_sums(
    connection: Connection, by: Sequence[str], where: Mapping[str, str], since_ms: int, until_ms: int
) -> list[dict[str, Any]]:
    """Sums of whole hours. Shape: `by` has any of `hour` and `NAMES`; `until_ms` is 0 for no end."""
    columns = [usage_hours.c[name] for name in by]
    query = select(*columns, *(func.sum(usage_hours.c[name]).label(name) for name in SUMS))
    query = query.where(usage_hours.c.hour >= since_ms // HOUR_MS)
    if until_ms:
        query = query.where(usage_hours.c.hour < -(-until_ms // HOUR_MS))
    for name, value in where.items():
        query = query.where(usage_hours.c[name] == value)
    if columns:
        query = query.group_by(*columns).order_by(*columns)
    return [dict(row._mapping) for row in connection.execute(query) if row._mapping["attempts"] is not None]


def load_attempts(connection: Connection, request_id: str) -> list[dict[str, Any]]:
    """The attempts of one request in order."""
    low, high = f"{request_id}-", f"{request_id}."
    query = select(usage_rows).where(usage_rows.c.attempt_id > low, usage_rows.c.attempt_id < high)
    return [dict(row._mapping) for row in connection.execute(query.order_by(usage_rows.c.id))]
