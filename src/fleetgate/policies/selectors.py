"""Selectors: the value of a request, key, Deployment or Gateway that a path like `request.body.a["b"]` reads."""

import msgspec

from fleetgate.core.routing.policy_decision import PathStep
from fleetgate.policies import cel_parser, evaluator, schema
from fleetgate.policies.cel_parser import CelError, Node
from fleetgate.policies.schema import ANY, STRING, VARIABLES, CelType, Selector, describe, suggestion

STEPS_MAX = 8


def selector_of(node: Node, forbidden: str, loop_variable: str) -> Selector | None:
    """The selector of a path; None if the node is not a path or begins with the variable of a macro.

    Raises: `CelError` if the path begins with the variable `forbidden` or does not exist.
    """
    steps: list[tuple[int, PathStep | Node]] = []
    while True:
        match node:
            case cel_parser.FieldNode():
                steps.append((node.offset, node.name))
                node = node.base
            case cel_parser.IndexNode():
                steps.append((node.offset, node.key))
                node = node.base
            case cel_parser.NameNode(name=name) if not loop_variable or name != loop_variable:
                return _path(node, steps[::-1], forbidden)
            case _:
                return None


def entry_of(selector: Selector, step: PathStep, offset: int) -> Selector:
    """The selector of an entry of a map, or of a value in the body. Raises: `CelError`."""
    type_ = type_of(selector)
    if type_.name == "list":
        raise CelError(offset, f"`{selector.text}` is a list", "use `in`, exists() or size()")
    if type_.name not in ("map", "dyn"):
        raise CelError(offset, f"`{selector.text}` is {describe(type_)} and has no fields", "use it as it is")
    if type(step) is int and type_.name == "map":
        raise CelError(offset, f"`{selector.text}` has names, not numbers, as keys", 'write a name in quotes: ["name"]')
    if len(selector.path) == STEPS_MAX:
        raise CelError(offset, f"the path has more than {STEPS_MAX} steps", "name a value nearer to the top")
    if (selector.root, selector.field) == ("request", "headers"):
        _check_header(str(step), offset)
    return msgspec.structs.replace(selector, path=(*selector.path, step))


def type_of(selector: Selector) -> CelType:
    """The type of the selected value."""
    type_ = VARIABLES[selector.root][selector.field]
    if not selector.path:
        return type_
    return ANY if type_.item == "dyn" else STRING


def may_be_absent(selector: Selector) -> bool:
    """Whether a value may be absent: an entry of labels, headers or body, or a price."""
    return bool(selector.path) or type_of(selector).nullable


def _path(root: cel_parser.NameNode, steps: list[tuple[int, PathStep | Node]], forbidden: str) -> Selector:
    if root.name == forbidden:
        message = (
            f"`{root.name}` is not available with `prefer:`, `set:` or `python:`: these apply to the whole request"
        )
        raise CelError(root.offset, message, "use it with `require:` alone, or remove it")
    if root.name not in VARIABLES:
        fix = suggestion(
            root.name, VARIABLES, f'put text in quotes: "{root.name[:40]}"; variables are: {", ".join(VARIABLES)}'
        )
        raise CelError(root.offset, f"there is no variable `{root.name[:40]}`", fix)
    fields = VARIABLES[root.name]
    if not steps:
        raise CelError(
            root.offset, f"`{root.name}` cannot be used as a whole", f"name a field of it: {', '.join(fields)}"
        )
    named = [(offset, _step(step)) for offset, step in steps]
    offset, field = named[0]
    if type(field) is not str or field not in fields:
        message = f"there is no `{root.name}.{str(field)[:40]}`"
        raise CelError(offset, message, suggestion(str(field), fields, prefix=f"{root.name}."))
    selector = Selector(root.name, field)
    for offset, step in named[1:]:
        selector = entry_of(selector, step, offset)
    return selector


def _step(step: PathStep | Node) -> PathStep:
    match step:
        case str() | int():
            return step
        case cel_parser.ConstantNode(type="string" | "int"):
            value: PathStep = evaluator.literal_value(step.text)
            return value
    raise CelError(step.offset, "the key of an entry must be a literal", 'write its name in quotes: ["name"]')


def _check_header(name: str, offset: int) -> None:
    if name.lower() in schema.SECRET_HEADERS:
        raise CelError(
            offset, f"header {name} may contain a secret and is not available to policies", "use `key.name` or a label"
        )
    if name != name.lower() or not name.isascii():
        raise CelError(
            offset, f"header names are in lower case, but this is {name[:60]!r}", f'write "{name.lower()[:60]}"'
        )
