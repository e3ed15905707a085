"""What is wrong with what somebody wrote: a place, a sentence and a way to mend it."""

from collections.abc import Iterable
from difflib import get_close_matches

import msgspec

_NEAR_ENOUGH = 0.6  # finds `strateggy` and `conncurrency`, leaves `colour` alone


class Problem(msgspec.Struct, frozen=True):
    """One mistake. Shape: `path` is `Kind/name: field[0].field`; `document` its place in the list given, from 0."""

    path: str
    message: str
    fix: str
    document: int = 0

    def sentence(self, source: str = "") -> str:
        """One line for a person: `fleet.yaml: Deployment/a: url: is not a URL; write http://HOST:PORT/v1`."""
        return ": ".join(part for part in (source, self.path, f"{self.message}; {self.fix}") if part)


class ResourceRefused(Exception):
    """Something was refused as a whole, with every reason; `conflict` when the state, not the text, forbids it."""

    def __init__(self, message: str, problems: Iterable[Problem] = (), conflict: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.problems = tuple(problems)
        self.conflict = conflict


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that was probably meant, or an empty string."""
    by_lower = {one.lower(): one for one in known}
    return next((by_lower[match] for match in get_close_matches(word.lower(), by_lower, 1, _NEAR_ENOUGH)), "")


def suggest(word: str, known: Iterable[str]) -> str:
    """The fix for a word that is not known: the nearest one, else all of them."""
    known = list(known)
    meant = nearest(word, known)
    if meant:
        return f"did you mean `{meant}`?"
    return f"use one of: {', '.join(known)}" if known else "there are none yet"


def printable(text: str) -> str:
    """Text that can go to any terminal or page: what cannot be printed is written as an escape."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def path_of(location: Iterable[str | int]) -> str:
    """`models[0].name` from ("models", 0, "name")."""
    text = ""
    for part in location:
        match part:
            case int():
                text += f"[{part}]"
            case _:
                text += f".{printable(part)}" if text else printable(part)
    return text
