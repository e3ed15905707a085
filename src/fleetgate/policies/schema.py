"""What policies can speak of: the variables, their fields and types."""

from collections.abc import Iterable
from difflib import get_close_matches

import msgspec

from fleetgate.core.routing.policy_decision import BodyPath


class Type(msgspec.Struct, frozen=True):
    """A type of CEL. Shape: `name` is CEL's; `nullable` says that it may be absent; `item` is a list's element type."""

    name: str
    nullable: bool = False
    item: str = ""


BOOL, INT, DOUBLE, STRING = Type("bool"), Type("int"), Type("double"), Type("string")
NULL = Type("null", nullable=True)
ANY = Type("dyn", nullable=True)  # a value of a body: its type shows when the request is there
STRINGS = Type("list", item="string")
ITEMS = Type("list", item="dyn")
PRICE = Type("double", nullable=True)
LABELS = Type("map", item="string")
BODY = Type("map", item="dyn")

VARIABLES: dict[str, dict[str, Type]] = {
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

# What carries a secret: a rule speaks of `key` instead, so that no log or error can ever show one.
SECRET_HEADERS = frozenset({"authorization", "proxy-authorization", "x-api-key", "api-key", "cookie"})


class Leaf(msgspec.Struct, frozen=True):
    """A value that an expression reads.

    Shape: `path` is what follows `root.field`; `use` is how it is read: `value`, `size`, `has` or `items`; `fields`
    are those of each item that are read.
    """

    root: str
    field: str
    path: BodyPath = ()
    use: str = "value"
    fields: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """As it is written in a policy."""
        text = f"{self.root}.{self.field}"
        for step in self.path:
            match step:
                case str(name) if name.isidentifier():
                    text += f".{name}"
                case _:
                    text += f"[{step!r}]"
        return text


def near(word: str, known: Iterable[str], else_: str = "", begin: str = "") -> str:
    """The fix for a word that is not known: the nearest one, else `else_` or all of them."""
    known = sorted(known)
    meant = get_close_matches(word, known, 1)
    if meant:
        return f"did you mean `{begin}{meant[0]}`?"
    return else_ or f"use one of: {', '.join(begin + one for one in known)}"


_ARTICLES = {
    "bool": "true or false",
    "int": "a whole number",
    "double": "a number",
    "string": "text",
    "list": "a list",
    "null": "null",
    "map": "a map",
    "dyn": "a value of unknown type",
}


def article(type_: Type) -> str:
    """A type in words."""
    return _ARTICLES[type_.name] + (" that may be absent" if type_ == PRICE else "")
