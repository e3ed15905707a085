"""Reads the files of `apply -f` and `--config`: YAML or JSON, one or more documents in a file."""

import json
import os
import sys
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

FILE_BYTES_MAX = 16 * 1024 * 1024
_ALIASES_MAX = 100  # a fleet file needs few; ten levels of ten aliases expand to 10 ** 10 values


class Unreadable(Exception):
    """A file could not be read as documents. Shape: `messages` are sentences with the place and the fix."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


class _Loader(yaml.SafeLoader):
    """Plain YAML with two limits: no key twice in a mapping, because one would be lost, and few aliases."""

    aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > _ALIASES_MAX:
                raise yaml.MarkedYAMLError(
                    problem=f"the file has more than {_ALIASES_MAX} aliases", problem_mark=self.get_mark()
                )
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = key.value
            if type(name) is str and key.tag != "tag:yaml.org,2002:merge":
                if name in seen:
                    raise yaml.MarkedYAMLError(problem=f"`{name}` is given twice", problem_mark=key.start_mark)
                seen.add(name)
        return super().construct_mapping(node, deep)


def read_file(path: str) -> list[object]:
    """Read the documents of a file, `-` for standard input.

    Raises: `Unreadable`.
    """
    try:
        if path == "-":
            data = sys.stdin.buffer.read(FILE_BYTES_MAX + 1)
        else:
            with Path(path).open("rb") as file:
                data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise Unreadable([f"{path}: cannot be read ({error.strerror}); give the path of a readable file"]) from error
    if len(data) > FILE_BYTES_MAX:
        raise Unreadable([f"{path}: is larger than {FILE_BYTES_MAX} bytes; split it into several files"])
    return parse(data, path)


def parse(data: bytes, source: str) -> list[object]:
    """Parse the documents in a text, without empty ones.

    Raises: `Unreadable`.
    """
    try:
        text = data.decode("utf-8-sig")
        if text.lstrip()[:1] in ("{", "["):
            return _from_json(text, source)
        return [value for value in yaml.load_all(text, _Loader) if value is not None]
    except UnicodeDecodeError as error:
        raise Unreadable([f"{source}: is not UTF-8 text; save it as UTF-8"]) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        position = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise Unreadable([f"{source}: {position}{error.problem or 'is not YAML'}; correct the YAML there"]) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise Unreadable([f"{source}: is not YAML ({str(error).splitlines()[0][:200]}); correct it"]) from error


def _from_json(text: str, source: str) -> list[object]:
    """Parse JSON: one document or a list. Text that is not JSON may be YAML in flow style."""
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError:
        return [value for value in yaml.load_all(text, _Loader) if value is not None]
    return value if type(value) is list else [value]


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for name, value in pairs:
        if name in mapping:
            raise ValueError(f"`{name}` is given twice")
        mapping[name] = value
    return mapping


def resolve_value(value: object, index: int) -> object:
    """Replace a Secret's `value_from: {env: VAR}` or `{file: PATH}` by its `value`; return other documents unchanged.

    Raises: `Unreadable`.
    """
    match value:
        case {"kind": "Secret", "value_from": source, **rest}:
            label = f"Secret/{rest['name']}" if type(rest.get("name")) is str else f"document {index + 1} (Secret)"
            if "value" in rest:
                raise Unreadable([f"{label}: value_from: excludes `value`; remove one of them"])
            return {**rest, "kind": "Secret", "value": _read_value(source, label)}
        case _:
            return value


def _read_value(source: object, label: str) -> str:
    match source:
        case {"env": str(variable), **rest} if not rest:
            if variable not in os.environ:
                raise Unreadable([f"{label}: value_from.env: {variable} is not set; export it first"])
            return os.environ[variable]
        case {"file": str(path), **rest} if not rest:
            try:
                return Path(path).expanduser().read_text("utf-8").rstrip("\r\n")
            except (OSError, UnicodeDecodeError) as error:
                raise Unreadable(
                    [f"{label}: value_from.file: {path} cannot be read; give a readable text file"]
                ) from error
        case _:
            raise Unreadable([f"{label}: value_from: is not a known source; write {{env: NAME}} or {{file: PATH}}"])
