"""Paths in an expression: which value of the request, key, Deployment or Gateway `request.body.a["b"]` reads."""

import msgspec

from fleetgate.core.routing.policy_decision import PathStep
from fleetgate.policies import cel_parser as grammar
from fleetgate.policies import evaluator as engine
from fleetgate.policies import schema as words
from fleetgate.policies.cel_parser import CelError, Node
from fleetgate.policies.schema import ANY, STRING, VARIABLES, Leaf, Type, article, near

STEPS_MAX = 8


def leaf_of(node: Node, without: str, loop: str) -> Leaf | None:
    """The value that a path reads; None where it is none or begins with `loop`, the variable of a macro.

    Raises: `CelError` where it begins with the variable `without` or leads nowhere.
    """
    steps: list[tuple[int, PathStep | Node]] = []
    while True:
        match node:
            case grammar.FieldNode():
                steps.append((node.at, node.name))
                node = node.base
            case grammar.IndexNode():
                steps.append((node.at, node.key))
                node = node.base
            case grammar.NameNode(name=name) if not loop or name != loop:
                return _path(node, steps[::-1], without)
            case _:
                return None


def entry(leaf: Leaf, step: PathStep, at: int) -> Leaf:
    """The entry of a map, or of a part of the body. Raises: `CelError`."""
    type_ = type_of(leaf)
    if type_.name == "list":
        raise CelError(at, f"`{leaf.shown}` is a list", "use `in`, exists() or size()")
    if type_.name not in ("map", "dyn"):
        raise CelError(at, f"`{leaf.shown}` is {article(type_)} and has no fields", "use it as it is")
    if type(step) is int and type_.name == "map":
        raise CelError(at, f"`{leaf.shown}` has names, not numbers", 'write a name in quotes: ["name"]')
    if len(leaf.path) == STEPS_MAX:
        raise CelError(at, f"the path has more than {STEPS_MAX} steps", "name a value nearer to the top")
    if (leaf.root, leaf.field) == ("request", "headers"):
        _check_header(str(step), at)
    return msgspec.structs.replace(leaf, path=(*leaf.path, step))


def type_of(leaf: Leaf) -> Type:
    """The type of a value as it is read."""
    type_ = VARIABLES[leaf.root][leaf.field]
    if not leaf.path:
        return type_
    return ANY if type_.item == "dyn" else STRING


def absentable(leaf: Leaf) -> bool:
    """Whether a value may be absent: an entry of labels, headers or body, or a price."""
    return bool(leaf.path) or type_of(leaf).nullable


def _path(root: grammar.NameNode, steps: list[tuple[int, PathStep | Node]], without: str) -> Leaf:
    if root.name == without:
        message = f"`{root.name}` cannot be read where a policy prefers, sets or runs Python: that is for the request"
        raise CelError(root.at, message, "use it with `require:` alone, or remove it")
    if root.name not in VARIABLES:
        fix = near(
            root.name, VARIABLES, f'put text in quotes: "{root.name[:40]}"; variables are: {", ".join(VARIABLES)}'
        )
        raise CelError(root.at, f"there is no variable `{root.name[:40]}`", fix)
    fields = VARIABLES[root.name]
    if not steps:
        raise CelError(root.at, f"`{root.name}` cannot be used as a whole", f"name a field of it: {', '.join(fields)}")
    named = [(at, _step(step)) for at, step in steps]
    at, field = named[0]
    if type(field) is not str or field not in fields:
        message = f"there is no `{root.name}.{str(field)[:40]}`"
        raise CelError(at, message, near(str(field), fields, begin=f"{root.name}."))
    leaf = Leaf(root.name, field)
    for at, step in named[1:]:
        leaf = entry(leaf, step, at)
    return leaf


def _step(step: PathStep | Node) -> PathStep:
    match step:
        case str() | int():
            return step
        case grammar.ConstantNode(type="string" | "int"):
            value: PathStep = engine.literal(step.text)
            return value
    raise CelError(step.at, "an entry must be written out", 'write its name in quotes: ["name"]')


def _check_header(name: str, at: int) -> None:
    if name.lower() in words.SECRET_HEADERS:
        raise CelError(at, f"header {name} may hold a secret and is not shown to policies", "use `key.name` or a label")
    if name != name.lower() or not name.isascii():
        raise CelError(at, f"header names are in lower case, and this is {name[:60]!r}", f'write "{name.lower()[:60]}"')
