"""Resources as the API answers them."""

from datetime import UTC, datetime
from typing import Any

from fleetgate.control.resources.apply import full_document, parse_stored
from fleetgate.control.resources.field_types import expires_at_s
from fleetgate.control.resources.schema import Key
from fleetgate.control.store.repository import Event, StoredKey, StoredResource


def resource_view(stored: StoredResource, key: StoredKey | None = None) -> dict[str, Any]:
    """A resource with its defaults filled in, its generation and its dates; never a secret."""
    resource = parse_stored(stored)
    fields = full_document(resource)
    fields.pop("value", None)
    shown = {"kind": fields.pop("kind"), "name": fields.pop("name"), **fields}
    match resource:
        case Key(expires=expires):
            ends_s = expires_at_s(expires, stored.created_s)
            if ends_s:
                shown["expires_at"] = rfc3339(ends_s)
            if key is not None:
                shown["id"] = key.id
    return {
        **shown,
        "generation": stored.generation,
        "created_at": rfc3339(stored.created_s),
        "updated_at": rfc3339(stored.updated_s),
    }


def event_view(kept: Event) -> dict[str, Any]:
    """An Event."""
    return {
        "kind": "Event",
        "id": kept.id,
        "at": rfc3339(kept.at_s),
        "object": {"kind": kept.kind, "name": kept.name},
        "sentence": kept.sentence,
    }


def rfc3339(at_s: float) -> str:
    """RFC 3339 in UTC."""
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
