"""Reads only the fields of a JSON body that policies name."""

from collections.abc import Collection
from typing import Any

import msgspec

from fleetgate.core.routing.policy_decision import BodyPath
from fleetgate.protocols.json_members import InvalidBody


class BodyReader:
    """Reads a fixed set of paths; created once per Snapshot.

    Cost: below 1 µs at 1 KiB if only top-level scalars are named; a named top-level value is decoded whole.
    """

    def __init__(self, paths: Collection[BodyPath]) -> None:
        self._paths = tuple(paths)
        keys = dict.fromkeys(str(path[0]) for path in self._paths)
        self._fields = {key: f"f{at}" for at, key in enumerate(keys)}
        fields = [(field, Any, None) for field in self._fields.values()]
        shape = msgspec.defstruct("Body", fields, rename={field: key for key, field in self._fields.items()})
        self._decode = msgspec.json.Decoder(shape).decode

    def read(self, body: bytes) -> dict[BodyPath, object]:
        """The values of the paths that exist.

        Raises: `InvalidBody` for what cannot be read.
        """
        try:
            decoded = self._decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidBody("invalid_json", f"the request body is not valid JSON: {error}") from None
        found: dict[BodyPath, object] = {}
        for path in self._paths:
            value: Any = getattr(decoded, self._fields[str(path[0])])
            for step in path[1:]:
                match value, step:
                    case dict(), str():
                        value = value.get(step)
                    case list(), int() if step < len(value):
                        value = value[step]
                    case _:
                        value = None
            if value is not None:
                found[path] = value
        return found
