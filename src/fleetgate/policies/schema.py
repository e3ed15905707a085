"""The variables of policies, with their fields and types."""

from collections.abc import Iterable
from difflib import get_close_matches

import msgspec

from fleetgate.core.routing.policy_decision import BodyPath


class CelType(msgspec.Struct, frozen=True):
    """A type of CEL. Shape: `name` is CEL's; `nullable` if the value may be absent; `item` is a list's element type."""

    name: str
    nullable: bool = False
    item: str = ""


BOOL, INT, DOUBLE, STRING = CelType("bool"), CelType("int"), CelType("double"), CelType("string")
NULL = CelType("null", nullable=True)
ANY = CelType("dyn", nullable=True)  # a value of a body: its type is known only for a request
STRINGS = CelType("list", item="string")
ITEMS = CelType("list", item="dyn")
PRICE = CelType("double", nullable=True)
LABELS = CelType("map", item="string")
BODY = CelType("map", item="dyn")

VARIABLES: dict[str, dict[str, CelType]] = {
    "request": {
        "model": STRING,
        "path": STRING,
        "stream": BOOL,
        "prompt_tokens": INT,
        "output_tokens_max": INT,
        "headers": LABELS,
        "body": BODY,
    },
    "key": {"name": STRING, "labels": LABELS},
    "deployment": {
        "name": STRING,
        "region": STRING,
        "cluster": STRING,
        "labels": LABELS,
        "tier": STRING,
        "engine": STRING,
        "models": STRINGS,
        "sku": STRING,
        "accelerators": INT,
        "usd_per_hour": PRICE,
        "usd_per_mtok_input": PRICE,
        "usd_per_mtok_output": PRICE,
    },
    "gateway": {"name": STRING, "domain": STRING},
}

# Headers that carry secrets. A policy uses `key` instead, so that no log or error can show a secret.
SECRET_HEADERS = frozenset({"authorization", "proxy-authorization", "x-api-key", "api-key", "cookie"})


class Selector(msgspec.Struct, frozen=True):
    """A value that an expression reads.

    Shape: `path` follows `root.field`; `use` is `value`, `size`, `has` or `items`; `fields` are the fields read of
    each item.
    """

    root: str
    field: str
    path: BodyPath = ()
    use: str = "value"
    fields: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The selector as it is written in a policy."""
        text = f"{self.root}.{self.field}"
        for step in self.path:
            match step:
                case str(name) if name.isidentifier():
                    text += f".{name}"
                case _:
                    text += f"[{step!r}]"
        return text


def suggestion(word: str, known: Iterable[str], fallback: str = "", prefix: str = "") -> str:
    """The fix for an unknown word: the nearest known one, otherwise `fallback` or the whole list."""
    known = sorted(known)
    close = get_close_matches(word, known, 1)
    if close:
        return f"did you mean `{prefix}{close[0]}`?"
    return fallback or f"use one of: {', '.join(prefix + one for one in known)}"


_DESCRIPTIONS = {
    "bool": "true or false",
    "int": "a whole number",
    "double": "a number",
    "string": "text",
    "list": "a list",
    "null": "null",
    "map": "a map",
    "dyn": "a value of unknown type",
}


def describe(type_: CelType) -> str:
    """A type in schema."""
    return _DESCRIPTIONS[type_.name] + (" that may be absent" if type_ == PRICE else "")
