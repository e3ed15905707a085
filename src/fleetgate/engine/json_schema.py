"""Values that match a JSON schema, for structured output and tool calls of a simulated engine."""

from typing import Any

import msgspec

from fleetgate.engine.text_generator import TextGenerator

_DEPTH_MAX = 8  # ends the recursion of a schema that refers to itself
_ITEMS_MAX = 64  # bounds the memory of a response
_CHARS_MAX = 4096
_VALUES_MAX = 2000  # bounds required fields that refer to the whole schema, which multiply at every level


class Schema(msgspec.Struct, frozen=True, omit_defaults=True):
    """The part of JSON Schema that is used; the rest is ignored."""

    type: str | list[str] | None = None
    properties: dict[str, "Schema | bool"] = {}
    required: list[str] | None = None
    items: "Schema | bool | None" = None
    enum: list[Any] = []
    const: Any = msgspec.UNSET
    any_of: list["Schema | bool"] = msgspec.field(default_factory=list, name="anyOf")
    one_of: list["Schema | bool"] = msgspec.field(default_factory=list, name="oneOf")
    ref: str | None = msgspec.field(default=None, name="$ref")
    defs: dict[str, "Schema | bool"] = msgspec.field(default_factory=dict, name="$defs")
    definitions: dict[str, "Schema | bool"] = {}
    minimum: float | None = None
    maximum: float | None = None
    min_items: int = msgspec.field(default=1, name="minItems")
    min_length: int = msgspec.field(default=0, name="minLength")
    max_length: int = msgspec.field(default=_CHARS_MAX, name="maxLength")


ANYTHING = Schema()


def generate_value(schema: Schema, generator: TextGenerator) -> object:
    """A value that matches the schema: types, properties, required, enum, const, bounds, references."""
    return _ValueGenerator(generator, schema).fill(schema, 0)


class _ValueGenerator:
    def __init__(self, generator: TextGenerator, root: Schema) -> None:
        self._generator = generator
        self._root = root
        self._index = 0
        self._values = 0

    def _number(self) -> int:
        self._index += 1
        return self._generator.number(self._index)

    def _word(self) -> str:
        self._index += 1
        return self._generator.word(self._index)

    def _resolve(self, schema: Schema | bool | None) -> Schema:
        for _ in range(_DEPTH_MAX):
            if not schema or schema is True:
                return ANYTHING
            if schema.ref is None:
                return schema
            name = schema.ref.rpartition("/")[2]
            schema = self._root if schema.ref == "#" else {**self._root.definitions, **self._root.defs}.get(name)
        return ANYTHING

    def fill(self, schema: Schema | bool | None, depth: int) -> object:
        self._values += 1
        if self._values > _VALUES_MAX:
            return None
        schema = self._resolve(schema)
        if schema.const is not msgspec.UNSET:
            return schema.const
        if schema.enum:
            return schema.enum[self._number() % len(schema.enum)]
        choices = schema.any_of or schema.one_of
        if choices and depth < _DEPTH_MAX:
            return self.fill(choices[0], depth + 1)
        kinds = [schema.type] if isinstance(schema.type, str) else schema.type or []
        default = "object" if schema.properties else "string"
        return self._value(
            next((kind for kind in kinds if kind != "null"), "null" if kinds else default), schema, depth
        )

    def _value(self, kind: str, schema: Schema, depth: int) -> object:
        match kind:
            case "object":
                return self._object(schema, depth)
            case "array":
                count = min(_ITEMS_MAX, schema.min_items) if depth < _DEPTH_MAX else 0
                return [self.fill(schema.items, depth + 1) for _ in range(count)]
            case "integer" | "number":
                low = schema.minimum if schema.minimum is not None else min(0.0, schema.maximum or 0.0)
                high = schema.maximum if schema.maximum is not None else low + 100
                value = min(high, low + self._number() % (int(high - low) + 1)) if high > low else low
                return int(value) if kind == "integer" else value
            case "boolean":
                return self._number() % 2 == 0
            case "null":
                return None
            case _:
                return self._string(schema)

    def _object(self, schema: Schema, depth: int) -> dict[str, object]:
        if depth >= _DEPTH_MAX:
            return {}
        required = schema.required if schema.required is not None else []
        # From the second level on only required properties are generated, so that a recursive schema ends.
        names = required if depth >= 2 else [*schema.properties, *(n for n in required if n not in schema.properties)]
        return {name: self.fill(schema.properties.get(name), depth + 1) for name in names}

    def _string(self, schema: Schema) -> str:
        text = f"{self._word()} {self._word()}"
        while len(text) < min(schema.min_length, _CHARS_MAX):
            text += " " + self._word()
        return text[: schema.max_length]
