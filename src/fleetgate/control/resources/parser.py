"""Parse documents into resources and report every mistake of every document, each with its path and a fix."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast, get_args

import msgspec
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fleetgate.control.resources.problems import Problem, nearest, path_of, printable, suggest
from fleetgate.control.resources.schema import KINDS, LATER_FIELDS, LATER_KINDS, READ_ONLY, Resource

DOCUMENTS_MAX = 10_000
_EXCERPT_CHARS_MAX = 60
_TYPES = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


class ParsedDocument(msgspec.Struct, frozen=True):
    """One document. Shape: `raw` is the document as written; `resource` is None if it has mistakes."""

    index: int
    label: str
    kind: str
    name: str
    raw: Mapping[str, Any]
    resource: Resource | None

    def problem(self, field: str, message: str, fix: str) -> Problem:
        """A mistake in one field of this document."""
        return Problem(f"{self.label}: {field}" if field else self.label, message, fix, self.index)


def parse_documents(values: Sequence[object]) -> tuple[list[ParsedDocument], list[Problem]]:
    """Parse documents one by one, so that a mistake in one hides none in another."""
    parsed_documents: list[ParsedDocument] = []
    problems: list[Problem] = []
    if len(values) > DOCUMENTS_MAX:
        return [], [Problem("", f"there are {len(values)} documents", f"apply at most {DOCUMENTS_MAX} at a time")]
    seen: set[tuple[str, str]] = set()
    for index, value in enumerate(values):
        parsed, found = _parse(index, value)
        problems.extend(found)
        if parsed is None:
            continue
        identity = (parsed.kind, parsed.name)
        if identity in seen:
            problems.append(parsed.problem("name", "is used twice for this kind", "rename or remove one of the two"))
        elif parsed.name:
            seen.add(identity)
        parsed_documents.append(parsed)
    return parsed_documents, problems


def _parse(index: int, value: object) -> tuple[ParsedDocument | None, list[Problem]]:
    numbered = f"document {index + 1}"
    match value:
        case {"kind": str(kind), **rest}:
            raw = cast(Mapping[str, Any], {"kind": kind, **rest})
        case {}:
            return None, [Problem(numbered, "kind: is missing", f"add `kind:` with one of: {', '.join(KINDS)}", index)]
        case _:
            return None, [Problem(numbered, "is not a mapping", "begin it with `kind:` and `name:`", index)]
    name = rest.get("name")
    name = name if type(name) is str else ""
    printed_kind = printable(kind[:_EXCERPT_CHARS_MAX])
    label = f"{printed_kind}/{printable(name[:_EXCERPT_CHARS_MAX])}" if name else f"{numbered} ({printed_kind})"
    if kind not in KINDS:
        return None, [Problem(f"{label}: kind", *_unknown_kind(kind), index)]
    try:
        resource = KINDS[kind].model_validate(raw)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=True, include_input=kind != "Secret")
        parsed = ParsedDocument(index, label, kind, name, raw, None)
        return parsed, list(_problems(parsed, found))
    return ParsedDocument(index, label, kind, name, raw, resource), []


def _unknown_kind(kind: str) -> tuple[str, str]:
    if kind in LATER_KINDS:
        return LATER_KINDS[kind], "remove this document"
    if kind == "Event":
        return "only Fleetgate writes Events", "remove this document"
    return f"there is no kind {_excerpt(kind)}", suggest(kind, KINDS)


def _problems(parsed: ParsedDocument, errors: Iterable[ErrorDetails]) -> Iterable[Problem]:
    errors = list(errors)
    misspelt = {
        (*error["loc"][:-1], nearest(str(error["loc"][-1]), _field_names(parsed.kind, error["loc"][:-1])))
        for error in errors
        if error["type"] == "extra_forbidden"
    }
    for error in errors:
        location = tuple(part for part in error["loc"] if part != "[key]")
        if error["type"] == "missing" and location in misspelt:
            continue  # the misspelt field is reported already
        message, fix = _explain(parsed.kind, error)
        yield parsed.problem(path_of(location), message, fix)


def _explain(kind: str, error: ErrorDetails) -> tuple[str, str]:
    context = error.get("ctx", {})
    field = str(error["loc"][-1]) if error["loc"] else ""
    match error["type"]:
        case "fleetgate":
            return str(context["message"]), str(context["fix"])
        case "missing":
            return "is missing", f"add `{field}:`"
        case "extra_forbidden":
            return _unknown_field(kind, error["loc"])
        case "literal_error":
            words = [word.strip("'") for word in str(context["expected"]).replace(" or ", ", ").split(", ")]
            return f"is {_excerpt(error.get('input'))}", suggest(str(error.get("input")), words)
        case "too_short" | "string_too_short":
            return "is empty", "give at least one" if error["type"] == "too_short" else "give a value or remove it"
        case "string_too_long":
            return "is too long", f"use at most {context['max_length']} characters"
        case wrong if wrong in _TYPES:
            message = (
                f" is {_excerpt(error['input'])}, not {_TYPES[wrong]}"
                if "input" in error
                else f" is not {_TYPES[wrong]}"
            )
            quotes = " (put it in quotes)" if wrong == "string_type" else ""
            return message.strip(), f"write {_TYPES[wrong]}{quotes}"
        case bound if bound in _BOUNDS:
            words_, key = _BOUNDS[bound]
            return f"is {_excerpt(error.get('input'))}", f"use a value of {words_} {context[key]}"
        case _:
            return error["msg"].lower(), "correct it"


def _unknown_field(kind: str, location: tuple[int | str, ...]) -> tuple[str, str]:
    field = str(location[-1])
    if len(location) == 1 and (kind, field) in LATER_FIELDS:
        return LATER_FIELDS[(kind, field)], "remove this field"
    if (kind, field) == ("Secret", "value_from"):
        return "only the CLI and --config read value_from", "send `value:` here"
    return "is not a known field", suggest(field, _field_names(kind, location[:-1]))


def _field_names(kind: str, location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = KINDS[kind]
    for part in location:
        if str(part) in model.model_fields:
            inner = _model_in(model.model_fields[str(part)].annotation)
            model = inner if inner is not None else model
    return [field for field in model.model_fields if field not in READ_ONLY]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The Part of `list[Part]`, `Part | None` or `Part`."""
    if type(annotation) is type(BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _model_in(inner))), None)


def _excerpt(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _EXCERPT_CHARS_MAX else f"{text[:_EXCERPT_CHARS_MAX]}…"
