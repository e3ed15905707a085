"""Resources and Events as the API returns them."""

from datetime import UTC, datetime
from typing import Any

from fleetgate.control.resources.apply import full_document, parse_stored
from fleetgate.control.resources.field_types import expires_at_s
from fleetgate.control.resources.schema import Key
from fleetgate.control.store.repository import Event, StoredKey, StoredResource


def resource_view(stored: StoredResource, key: StoredKey | None = None) -> dict[str, Any]:
    """A resource with its defaults, its generation and its dates, without secrets."""
    resource = parse_stored(stored)
    fields = full_document(resource)
    fields.pop("value", None)
    view = {"kind": fields.pop("kind"), "name": fields.pop("name"), **fields}
    match resource:
        case Key(expires=expires):
            expires_s = expires_at_s(expires, stored.created_s)
            if expires_s:
                view["expires_at"] = rfc3339(expires_s)
            if key is not None:
                view["id"] = key.id
    return {
        **view,
        "generation": stored.generation,
        "created_at": rfc3339(stored.created_s),
        "updated_at": rfc3339(stored.updated_s),
    }


def event_view(event: Event) -> dict[str, Any]:
    """An Event."""
    return {
        "kind": "Event",
        "id": event.id,
        "at": rfc3339(event.at_s),
        "object": {"kind": event.kind, "name": event.name},
        "sentence": event.sentence,
    }


def rfc3339(at_s: float) -> str:
    """A time as RFC 3339 text in UTC."""
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
