"""The mistakes of a document: a path, a message and a fix."""

from collections.abc import Iterable
from difflib import get_close_matches

import msgspec

_SIMILARITY_MIN = 0.6  # matches `strateggy` and `conncurrency`, but not `colour`


class Problem(msgspec.Struct, frozen=True):
    """One mistake. Shape: `path` is `Kind/name: field[0].field`; `document` is its index in the given list."""

    path: str
    message: str
    fix: str
    document: int = 0

    def sentence(self, source: str = "") -> str:
        """One line of text: `fleet.yaml: Deployment/a: url: is not a URL; write http://HOST:PORT/v1`."""
        return ": ".join(part for part in (source, self.path, f"{self.message}; {self.fix}") if part)


class ResourceRefused(Exception):
    """A change is refused as a whole. Shape: `conflict` is true if the current state forbids it, not its text."""

    def __init__(self, message: str, problems: Iterable[Problem] = (), conflict: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.problems = tuple(problems)
        self.conflict = conflict


def nearest(word: str, known: Iterable[str]) -> str:
    """The most similar known word, or an empty string if none is similar enough."""
    by_lower = {one.lower(): one for one in known}
    return next((by_lower[match] for match in get_close_matches(word.lower(), by_lower, 1, _SIMILARITY_MIN)), "")


def suggest(word: str, known: Iterable[str]) -> str:
    """The fix for an unknown word: the most similar known word, or all known words if none is similar."""
    known = list(known)
    similar = nearest(word, known)
    if similar:
        return f"did you mean `{similar}`?"
    return f"use one of: {', '.join(known)}" if known else "there are none yet"


def printable(text: str) -> str:
    """Text that is safe for any terminal or page: characters that cannot be printed are escaped."""
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
