"""Queries for resources, keys, sealed secrets, Events and numbers, with values in and values out."""

import json
from typing import Any

import msgspec
from sqlalchemy import Connection, delete, select
from sqlalchemy.dialects.sqlite import insert

from fleetgate.control.store.schema import events, keys, numbers, resources, secrets

EVENTS_KEPT = 10_000
_PRUNE_EVERY = 256


class StoredResource(msgspec.Struct, frozen=True):
    """A stored resource. Shape: `document` is as written, with kind and name, without the value of a Secret."""

    kind: str
    name: str
    document: dict[str, Any]
    generation: int
    trusted: bool
    created_s: float
    updated_s: float


class StoredKey(msgspec.Struct, frozen=True):
    """The stored part of a Key's token: its id and the HMAC of its secret."""

    name: str
    id: str
    secret_hmac: str


class Event(msgspec.Struct, frozen=True):
    """A stored Event."""

    id: int
    at_s: float
    kind: str
    name: str
    sentence: str


StoredResources = dict[tuple[str, str], StoredResource]


def load_resources(connection: Connection) -> StoredResources:
    """All resources by kind and name."""
    rows = connection.execute(select(resources).order_by(resources.c.kind, resources.c.name))
    return {(row.kind, row.name): _stored(row) for row in rows}


def load_resource(connection: Connection, kind: str, name: str) -> StoredResource | None:
    """One resource, or None if it does not exist."""
    query = select(resources).where(resources.c.kind == kind, resources.c.name == name)
    row = connection.execute(query).first()
    return _stored(row) if row is not None else None


def save_resource(connection: Connection, stored: StoredResource) -> None:
    """Write a resource, new or changed."""
    spec = {field: value for field, value in stored.document.items() if field not in ("kind", "name")}
    values = {
        "spec": json.dumps(spec, separators=(",", ":")),
        "generation": stored.generation,
        "trusted": stored.trusted,
        "created_s": stored.created_s,
        "updated_s": stored.updated_s,
    }
    statement = insert(resources).values(kind=stored.kind, name=stored.name, **values)
    connection.execute(statement.on_conflict_do_update(index_elements=["kind", "name"], set_=values))


def remove_resource(connection: Connection, kind: str, name: str) -> None:
    """Delete a resource and its key or sealed secret."""
    connection.execute(delete(resources).where(resources.c.kind == kind, resources.c.name == name))
    if kind == "Key":
        connection.execute(delete(keys).where(keys.c.name == name))
    if kind == "Secret":
        connection.execute(delete(secrets).where(secrets.c.name == name))


def save_key(connection: Connection, key: StoredKey) -> None:
    """Write the stored part of a new key."""
    connection.execute(keys.insert().values(name=key.name, id=key.id, secret_hmac=key.secret_hmac))


def load_keys(connection: Connection) -> dict[str, StoredKey]:
    """The stored part of all keys, by name."""
    rows = connection.execute(select(keys))
    return {row.name: StoredKey(row.name, row.id, row.secret_hmac) for row in rows}


def save_secret(connection: Connection, name: str, sealed: str) -> None:
    """Write a sealed secret, new or changed."""
    statement = insert(secrets).values(name=name, sealed=sealed)
    connection.execute(statement.on_conflict_do_update(index_elements=["name"], set_={"sealed": sealed}))


def load_secrets(connection: Connection) -> dict[str, str]:
    """All sealed secrets by name."""
    return {row.name: row.sealed for row in connection.execute(select(secrets))}


def add_event(connection: Connection, at_s: float, kind: str, name: str, sentence: str) -> None:
    """Write an Event, and delete the oldest beyond `EVENTS_KEPT`."""
    result = connection.execute(events.insert().values(at_s=at_s, kind=kind, name=name, sentence=sentence))
    newest = result.inserted_primary_key[0] if result.inserted_primary_key else 0
    if newest % _PRUNE_EVERY == 0:
        connection.execute(delete(events).where(events.c.id <= newest - EVENTS_KEPT))


def load_events(connection: Connection, after: int, limit: int, of: tuple[str, str] | None = None) -> list[Event]:
    """Events, oldest first: the first `limit` after an id, or the last `limit` if `after` is 0."""
    query = select(events)
    if of is not None:
        query = query.where(events.c.kind == of[0], events.c.name == of[1])
    if after > 0:
        query = query.where(events.c.id > after).order_by(events.c.id).limit(limit)
    else:
        query = query.order_by(events.c.id.desc()).limit(limit)
    found = [Event(row.id, row.at_s, row.kind, row.name, row.sentence) for row in connection.execute(query)]
    return sorted(found, key=lambda event: event.id)


def load_number(connection: Connection, name: str) -> int:
    """A stored number, 0 if it was never written."""
    return connection.execute(select(numbers.c.value).where(numbers.c.name == name)).scalar() or 0


def save_number(connection: Connection, name: str, value: int) -> None:
    """Write a number."""
    statement = insert(numbers).values(name=name, value=value)
    connection.execute(statement.on_conflict_do_update(index_elements=["name"], set_={"value": value}))


def _stored(row: Any) -> StoredResource:
    document = {"kind": row.kind, "name": row.name, **json.loads(row.spec)}
    return StoredResource(row.kind, row.name, document, row.generation, row.trusted, row.created_s, row.updated_s)
