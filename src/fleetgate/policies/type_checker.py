"""Types of a policy's expression, found before it runs, and the same expression over flat, always present values.

Every value that an expression reads becomes one variable `v0`, `v1`, …, and what may be absent gets a default where a
value is needed. So nothing absent can fail, and the proxy hands over no more than what is read.
"""

import re

import msgspec

from fleetgate.policies import cel_parser as grammar
from fleetgate.policies import evaluator as engine
from fleetgate.policies import schema as words
from fleetgate.policies.cel_parser import CelError, Node
from fleetgate.policies.regex_limits import check_pattern
from fleetgate.policies.schema import ANY, BOOL, DOUBLE, INT, NULL, STRING, VARIABLES, Leaf, Type, article, near
from fleetgate.policies.selectors import absentable, entry, leaf_of, type_of

_VARIABLE = re.compile(r"\bv\d+\b")
_NUMBERS = frozenset({"int", "double", "dyn"})
_CONVERTED = {"int": (INT, "0"), "double": (DOUBLE, "0.0"), "string": (STRING, '""')}
_EMPTY = {"bool": "false", "string": '""', "list": "[]"}
_TESTS = ("startsWith", "endsWith", "contains", "matches")
_LOOPS = ("exists", "all", "exists_one")
_METHODS = (*_TESTS, *_LOOPS, "size")
_FUNCTIONS = ("size", "has", *_CONVERTED)


class Expression(msgspec.Struct, frozen=True):
    """A checked expression. Shape: `text` is CEL over the variables that `leaves` names."""

    source: str
    text: str
    leaves: tuple[tuple[str, Leaf], ...]

    def reads(self, root: str) -> bool:
        """Whether it depends on a variable."""
        return any(leaf.root == root for _, leaf in self.leaves)


class Typed(msgspec.Struct, frozen=True):
    """A part of an expression: what it evaluates to and its text. `leaf` where it is a value that is read."""

    type: Type
    text: str
    leaf: Leaf | None = None
    null: bool = False


def check(source: str, without: str = "") -> Expression:
    """Check that an expression is a condition over what is known; `without` names a variable that it may not read.

    Raises: `CelError`.
    """
    node = grammar.parse(source)
    walk = _Walk(without)
    text = walk.as_bool(node, "a condition")
    try:
        engine.compile_text(source)
        engine.compile_text(text)
    except ValueError as error:
        reason = str(error).partition("Syntax error: ")[2].partition("\n")[0] or "it is not valid CEL"
        raise CelError(0, f"the expression cannot be read: {reason}", "correct it") from None
    read = set(_VARIABLE.findall(text))
    return Expression(source, text, tuple((name, leaf) for leaf, name in walk.leaves.items() if name in read))


class _Loop(msgspec.Struct):
    """The variable of a macro; `fields` are those of each item that are read."""

    name: str
    item: str
    fields: dict[str, None] = {}


class _Walk:
    def __init__(self, without: str) -> None:
        self.leaves: dict[Leaf, str] = {}
        self._without = without
        self._loop: _Loop | None = None

    # --- what is needed of a part ---

    def as_bool(self, node: Node, where: str) -> str:
        """A part that must be true or false."""
        return self._needed(node, BOOL, f"{where} must be true or false", "compare it with something")

    def _needed(self, node: Node, need: Type, message: str, fix: str) -> str:
        typed = self.typed(node)
        if typed.type.name not in (need.name, "dyn"):
            raise CelError(node.at, f"{message}, but this is {article(typed.type)}", fix)
        if typed.type.nullable:
            return f"({typed.text} == null ? {_EMPTY[need.name]} : {typed.text})"
        return typed.text

    # --- the kinds of parts ---

    def typed(self, node: Node) -> Typed:
        """The type and text of a part."""
        match node:
            case grammar.ConstantNode():
                return Typed(NULL if node.type == "null" else Type(node.type), node.text, null=node.type == "null")
            case grammar.NameNode() | grammar.FieldNode() | grammar.IndexNode():
                return self._read(node)
            case grammar.UnaryNode():
                return self._unary(node)
            case grammar.BinaryNode():
                return self._binary(node)
            case grammar.ConditionalNode():
                return self._choice(node)
            case grammar.ListNode():
                return self._items(node)
            case grammar.CallNode():
                return self._call(node)

    def _unary(self, node: grammar.UnaryNode) -> Typed:
        if node.mark == "!":
            return Typed(BOOL, f"!{self.as_bool(node.value, 'what stands after `!`')}")
        typed = self.typed(node.value)
        _number(node.value, typed)
        return Typed(typed.type, f"-({typed.text})")

    def _choice(self, node: grammar.ConditionalNode) -> Typed:
        test = self.as_bool(node.test, "what stands before `?`")
        yes, no = self.typed(node.yes), self.typed(node.no)
        if yes.type.name != no.type.name and not {"dyn", "null"} & {yes.type.name, no.type.name}:
            message = f"`?` gives {article(yes.type)} or {article(no.type)}"
            raise CelError(node.at, message, "let both sides have the same type")
        same = yes.type if yes.type.name == no.type.name else ANY
        nullable = yes.type.nullable or no.type.nullable
        return Typed(Type(same.name, nullable, same.item), f"({test} ? {yes.text} : {no.text})")

    def _items(self, node: grammar.ListNode) -> Typed:
        items = [self.typed(item) for item in node.items]
        kinds = {item.type.name for item in items}
        for item, part in zip(items, node.items, strict=True):
            if item.type.name == "list" or len(kinds) > 1:
                raise CelError(part.at, f"this is {article(item.type)} in a list", "list values of one simple type")
        item_type = items[0].type.name if items else "dyn"
        return Typed(Type("list", item=item_type), f"[{', '.join(item.text for item in items)}]")

    def _binary(self, node: grammar.BinaryNode) -> Typed:
        match node.mark:
            case "&&" | "||":
                where = f"each side of `{node.mark}`"
                left, right = self.as_bool(node.left, where), self.as_bool(node.right, where)
                return Typed(BOOL, f"({left} {node.mark} {right})")
            case "in":
                return self._in(node)
            case "==" | "!=":
                return self._equal(node)
            case "<" | "<=" | ">" | ">=":
                return self._ordered(node)
        return self._arithmetic(node)

    def _equal(self, node: grammar.BinaryNode) -> Typed:
        sides = [self.typed(node.left), self.typed(node.right)]
        for one, other in (sides, sides[::-1]):
            absent = other.null or other.text in ('""', "''")
            if one.leaf is not None and absent and absentable(one.leaf):
                text = self._has(one.leaf)
                return Typed(BOOL, text if node.mark == "!=" else f"!{text}")
        left, right = (side.type.name for side in sides)
        alike = left == right or (left in _NUMBERS and right in _NUMBERS)
        dyn = "dyn" in (left, right) or (any(s.null for s in sides) and all(s.type.nullable for s in sides))
        if "list" in (left, right) or not (alike or dyn):
            message = f"`{node.mark}` compares {article(sides[0].type)} with {article(sides[1].type)}"
            raise CelError(node.at, message, _compare_fix(left, right))
        texts = [_text_or_empty(side, other) for side, other in (sides, sides[::-1])]
        return Typed(BOOL, f"({texts[0]} {node.mark} {texts[1]})")

    def _ordered(self, node: grammar.BinaryNode) -> Typed:
        left, right = self.typed(node.left), self.typed(node.right)
        names = {left.type.name, right.type.name}
        if not (names <= _NUMBERS or names <= {"string", "dyn"}):
            message = f"`{node.mark}` compares {article(left.type)} with {article(right.type)}"
            raise CelError(node.at, message, _compare_fix(left.type.name, right.type.name))
        text = f"{left.text} {node.mark} {right.text}"
        present = [f"{side.text} != null" for side in (left, right) if side.type.nullable]
        return Typed(BOOL, f"({' && '.join([*present, text])})")

    def _arithmetic(self, node: grammar.BinaryNode) -> Typed:
        left, right = self.typed(node.left), self.typed(node.right)
        for side, part in ((left, node.left), (right, node.right)):
            if not (node.mark == "+" and side.type == STRING):
                _number(part, side)
        if left.type.name != right.type.name or (node.mark == "%" and left.type != INT):
            message = f"`{node.mark}` joins {article(left.type)} and {article(right.type)}"
            raise CelError(node.at, message, "convert one of them with int(), double() or string()")
        return Typed(left.type, f"({left.text} {node.mark} {right.text})")

    def _in(self, node: grammar.BinaryNode) -> Typed:
        named = self._map_entry(node)
        if named is not None:
            return Typed(BOOL, self._has(named))
        left, right = self.typed(node.left), self._range(node.right, "`in`")
        item = right.type.item
        if left.type.name == "list":
            raise CelError(node.left.at, "a list cannot be in a list", "ask for one value")
        if "dyn" not in (left.type.name, item) and left.type.name != item and not left.null:
            message = f"this is {article(left.type)}, but the list has {item} values"
            raise CelError(node.left.at, message, _compare_fix(left.type.name, item))
        found = f'({left.text} == null ? "" : {left.text})' if left.type == ANY and item == "string" else left.text
        return Typed(BOOL, f"({found} in {right.text or self._items_of(right.leaf)})")

    def _map_entry(self, node: grammar.BinaryNode) -> Leaf | None:
        """The entry that `"name" in key.labels` asks for."""
        leaf = self._names(node.right)
        if leaf is None or leaf.path or VARIABLES[leaf.root][leaf.field].name != "map":
            return None
        match node.left:
            case grammar.ConstantNode(type="string"):
                return entry(leaf, engine.literal(node.left.text), node.left.at)
        raise CelError(node.left.at, f"the entry of `{leaf.shown}` is not written out", 'write it in quotes: "name"')

    def _range(self, node: Node, where: str) -> Typed:
        """A part that must be a list. One in the body has no text yet: that depends on what is read of each item."""
        leaf = self._names(node)
        if leaf is not None and leaf.root == "request" and leaf.field == "body":
            return Typed(words.ITEMS, "", leaf)
        typed = self.typed(node)
        if typed.type.name != "list":
            raise CelError(node.at, f"{where} needs a list, but this is {article(typed.type)}", "give a list")
        return typed

    def _items_of(self, leaf: Leaf | None, fields: tuple[str, ...] = ()) -> str:
        """A list in the body: of each item no more than these fields is handed over."""
        assert leaf is not None
        return self._variable(msgspec.structs.replace(leaf, use="items", fields=fields))

    # --- functions ---

    def _call(self, node: grammar.CallNode) -> Typed:
        known = _FUNCTIONS if node.receiver is None else _METHODS
        if node.name not in known:
            begin = "" if node.receiver is None else "."
            raise CelError(node.at, f"there is no function `{node.name[:40]}`", near(node.name, known, begin=begin))
        wanted = 2 if node.name in _LOOPS else 0 if node.receiver is not None and node.name == "size" else 1
        if len(node.args) != wanted:
            message = f"`{node.name}` has {len(node.args)} values in its brackets"
            raise CelError(node.at, message, f"give {wanted or 'none'}")
        if node.receiver is None and node.name in _CONVERTED:
            return self._converted(node.name, node.args[0])
        if node.name == "has":
            return Typed(BOOL, self._present(node.args[0]))
        if node.name == "size":
            return self._size(node.args[0] if node.receiver is None else node.receiver)
        assert node.receiver is not None
        if node.name in _LOOPS:
            return self._macro(node, node.receiver)
        return self._text_test(node, node.receiver)

    def _text_test(self, node: grammar.CallNode, receiver: Node) -> Typed:
        where = f"`{node.name}` reads text"
        subject = self._needed(receiver, STRING, where, "convert it with string()")
        argument = self._needed(node.args[0], STRING, where, "write it in quotes")
        if node.name == "matches":
            check_pattern(node.args[0])
        return Typed(BOOL, f"{subject}.{node.name}({argument})")

    def _converted(self, name: str, value: Node) -> Typed:
        to, empty = _CONVERTED[name]
        typed = self.typed(value)
        if typed.type.name == "list" or (typed.type.name == "bool" and name != "string"):
            raise CelError(value.at, f"{name}() cannot convert {article(typed.type)}", "give a number or text")
        if typed.null:
            raise CelError(value.at, f"{name}() of null says nothing", "remove it")
        text = f"{name}({typed.text})"
        if name != "string" and typed.type.name in ("string", "dyn"):
            text = f'({typed.text} == "" ? {empty} : {text})'
        if typed.type.nullable:
            text = f"({typed.text} == null ? {empty} : {text})"
        return Typed(to, text)

    def _present(self, node: Node) -> str:
        leaf = self._names(node)
        if leaf is None:
            typed = self.typed(node)
            if self._loop is None or not typed.type.nullable:
                raise CelError(node.at, "has() asks for an entry", "name one, like has(key.labels.team)")
            return f"({typed.text} != null)"
        if not leaf.path and VARIABLES[leaf.root][leaf.field].name == "map":
            raise CelError(node.at, f"`{leaf.shown}` is always there", "name an entry of it")
        return self._has(leaf)

    def _has(self, leaf: Leaf) -> str:
        return self._variable(msgspec.structs.replace(leaf, use="has"))

    def _size(self, node: Node) -> Typed:
        leaf = self._names(node)
        type_ = type_of(leaf) if leaf is not None else Type("")
        if leaf is None or type_.name not in ("string", "list", "dyn"):
            raise CelError(node.at, "size() counts text or lists of a request, key or Deployment", "give one of them")
        return Typed(INT, self._variable(msgspec.structs.replace(leaf, use="size")))

    def _macro(self, node: grammar.CallNode, receiver: Node) -> Typed:
        if self._loop is not None:
            raise CelError(node.at, f"`{node.name}` stands inside another", "use one; nested ones cost too much")
        source = self._range(receiver, f"`{node.name}`")
        match node.args[0]:
            case grammar.NameNode(name=name) if name not in VARIABLES:
                self._loop = _Loop(name, source.type.item)
            case other:
                raise CelError(other.at, "this is no name for each item", "write a new name first, like exists(m, …)")
        condition = self.as_bool(node.args[1], f"the condition of `{node.name}`")
        fields, self._loop = tuple(sorted(self._loop.fields)), None
        text = source.text or self._items_of(source.leaf, fields)
        return Typed(BOOL, f"{text}.{node.name}(x, {condition})")

    # --- what is read ---

    def _read(self, node: grammar.NameNode | grammar.FieldNode | grammar.IndexNode) -> Typed:
        leaf = self._names(node)
        if leaf is not None:
            type_ = type_of(leaf)
            if type_.name == "map":
                fix = f'name an entry of it, like {leaf.shown}["name"]'
                raise CelError(node.at, f"`{leaf.shown}` cannot be used as a whole", fix)
            return Typed(type_, self._variable(leaf), leaf)
        match node:
            case grammar.NameNode():
                assert self._loop is not None
                return Typed(ANY if self._loop.item == "dyn" else Type(self._loop.item), "x")
            case grammar.FieldNode(base=grammar.NameNode(name=name)) if (
                self._loop is not None and name == self._loop.name
            ):
                if self._loop.item != "dyn":
                    raise CelError(node.at, f"`{name}` is {self._loop.item} and has no fields", f"use `{name}` itself")
                self._loop.fields[node.name] = None
                return Typed(ANY, f"x.{node.name}")
        message = "only a field of a variable, label, header or body can be read"
        raise CelError(node.at, message, "name the whole path, and for items of a list use exists()")

    def _names(self, node: Node) -> Leaf | None:
        """The value that a path reads; None where it does not begin with a variable of `VARIABLES`."""
        return leaf_of(node, self._without, self._loop.name if self._loop is not None else "")

    def _variable(self, leaf: Leaf) -> str:
        return self.leaves.setdefault(leaf, f"v{len(self.leaves)}")


def _text_or_empty(side: Typed, other: Typed) -> str:
    """What is absent is equal to an empty text."""
    if side.type == ANY and other.type == STRING:
        return f'({side.text} == null ? "" : {side.text})'
    return side.text


def _number(node: Node, typed: Typed) -> None:
    if typed.type.name not in ("int", "double") or typed.type.nullable:
        fix = "convert it with int() or double()"
        raise CelError(node.at, f"a number is needed, but this is {article(typed.type)}", fix)


def _compare_fix(left: str, right: str) -> str:
    if "list" in (left, right):
        return "ask with `in` or exists()"
    if "string" in (left, right) and {"int", "double"} & {left, right}:
        return "write the number without quotes, or convert with int() or string()"
    if "null" in (left, right):
        return "remove it: this is never absent"
    return "compare values of one type"
