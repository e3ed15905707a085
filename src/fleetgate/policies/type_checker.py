"""Static type checker for expressions of policies; it rewrites them over flat values that are always present.

Every value that an expression reads becomes one variable `v0`, `v1`, …, and a value that may be absent gets a default.
So an absent value cannot fail, and the proxy passes only the values that are read to CEL.
"""

import re

import msgspec

from fleetgate.policies import cel_parser, evaluator, schema
from fleetgate.policies.cel_parser import CelError, Node
from fleetgate.policies.regex_limits import check_pattern
from fleetgate.policies.schema import (
    ANY,
    BOOL,
    DOUBLE,
    INT,
    NULL,
    STRING,
    VARIABLES,
    CelType,
    Selector,
    describe,
    suggestion,
)
from fleetgate.policies.selectors import entry_of, may_be_absent, selector_of, type_of

_VARIABLE = re.compile(r"\bv\d+\b")
_NUMBERS = frozenset({"int", "double", "dyn"})
_CONVERSIONS = {"int": (INT, "0"), "double": (DOUBLE, "0.0"), "string": (STRING, '""')}
_DEFAULTS = {"bool": "false", "string": '""', "list": "[]"}
_TEXT_METHODS = ("startsWith", "endsWith", "contains", "matches")
_MACROS = ("exists", "all", "exists_one")
_METHODS = (*_TEXT_METHODS, *_MACROS, "size")
_FUNCTIONS = ("size", "has", *_CONVERSIONS)


class Expression(msgspec.Struct, frozen=True):
    """A checked expression. Shape: `text` is CEL over the variables that `selectors` names."""

    source: str
    text: str
    selectors: tuple[tuple[str, Selector], ...]

    def reads(self, root: str) -> bool:
        """Whether it reads a variable."""
        return any(selector.root == root for _, selector in self.selectors)


class TypedExpression(msgspec.Struct, frozen=True):
    """A subexpression with its type and rewritten text; `selector` if it is a value that is read."""

    type: CelType
    text: str
    selector: Selector | None = None
    null: bool = False


def check(source: str, forbidden: str = "") -> Expression:
    """Check that an expression is a condition over known variables; it may not read the variable `forbidden`.

    Raises: `CelError`.
    """
    node = cel_parser.parse(source)
    checker = _Checker(forbidden)
    text = checker.require_bool(node, "a condition")
    try:
        evaluator.compile_expression(source)
        evaluator.compile_expression(text)
    except ValueError as error:
        reason = str(error).partition("Syntax error: ")[2].partition("\n")[0] or "it is not valid CEL"
        raise CelError(0, f"the expression cannot be read: {reason}", "correct the expression") from None
    read = set(_VARIABLE.findall(text))
    return Expression(
        source, text, tuple((name, selector) for selector, name in checker.selectors.items() if name in read)
    )


class _Macro(msgspec.Struct):
    """The macro that encloses a subexpression, with its variable; `fields` are the fields read of each item."""

    name: str
    item: str
    fields: dict[str, None] = {}


class _Checker:
    def __init__(self, forbidden: str) -> None:
        self.selectors: dict[Selector, str] = {}
        self._forbidden = forbidden
        self._macro: _Macro | None = None

    # --- required types ---

    def require_bool(self, node: Node, where: str) -> str:
        """The text of a subexpression that must be true or false."""
        return self._require_type(node, BOOL, f"{where} must be true or false", "compare it with a value")

    def _require_type(self, node: Node, need: CelType, message: str, fix: str) -> str:
        typed = self.typed(node)
        if typed.type.name not in (need.name, "dyn"):
            raise CelError(node.offset, f"{message}, but this is {describe(typed.type)}", fix)
        if typed.type.nullable:
            return f"({typed.text} == null ? {_DEFAULTS[need.name]} : {typed.text})"
        return typed.text

    # --- kinds of subexpressions ---

    def typed(self, node: Node) -> TypedExpression:
        """The type and text of a subexpression."""
        match node:
            case cel_parser.ConstantNode():
                return TypedExpression(
                    NULL if node.type == "null" else CelType(node.type), node.text, null=node.type == "null"
                )
            case cel_parser.NameNode() | cel_parser.FieldNode() | cel_parser.IndexNode():
                return self._read(node)
            case cel_parser.UnaryNode():
                return self._unary(node)
            case cel_parser.BinaryNode():
                return self._binary(node)
            case cel_parser.ConditionalNode():
                return self._conditional(node)
            case cel_parser.ListNode():
                return self._list(node)
            case cel_parser.CallNode():
                return self._call(node)

    def _unary(self, node: cel_parser.UnaryNode) -> TypedExpression:
        if node.operator == "!":
            return TypedExpression(BOOL, f"!{self.require_bool(node.value, 'the operand of `!`')}")
        typed = self.typed(node.value)
        _require_number(node.value, typed)
        return TypedExpression(typed.type, f"-({typed.text})")

    def _conditional(self, node: cel_parser.ConditionalNode) -> TypedExpression:
        condition = self.require_bool(node.condition, "the condition before `?`")
        if_true, if_false = self.typed(node.if_true), self.typed(node.if_false)
        if if_true.type.name != if_false.type.name and not {"dyn", "null"} & {if_true.type.name, if_false.type.name}:
            message = f"`?` results in {describe(if_true.type)} or {describe(if_false.type)}"
            raise CelError(node.offset, message, "use values of the same type on both sides")
        same = if_true.type if if_true.type.name == if_false.type.name else ANY
        nullable = if_true.type.nullable or if_false.type.nullable
        return TypedExpression(
            CelType(same.name, nullable, same.item), f"({condition} ? {if_true.text} : {if_false.text})"
        )

    def _list(self, node: cel_parser.ListNode) -> TypedExpression:
        items = [self.typed(item) for item in node.items]
        kinds = {item.type.name for item in items}
        for item, part in zip(items, node.items, strict=True):
            if item.type.name == "list" or len(kinds) > 1:
                raise CelError(part.offset, f"this is {describe(item.type)} in a list", "use values of one simple type")
        item_type = items[0].type.name if items else "dyn"
        return TypedExpression(CelType("list", item=item_type), f"[{', '.join(item.text for item in items)}]")

    def _binary(self, node: cel_parser.BinaryNode) -> TypedExpression:
        match node.operator:
            case "&&" | "||":
                where = f"each side of `{node.operator}`"
                left, right = self.require_bool(node.left, where), self.require_bool(node.right, where)
                return TypedExpression(BOOL, f"({left} {node.operator} {right})")
            case "in":
                return self._in(node)
            case "==" | "!=":
                return self._equal(node)
            case "<" | "<=" | ">" | ">=":
                return self._ordered(node)
        return self._arithmetic(node)

    def _equal(self, node: cel_parser.BinaryNode) -> TypedExpression:
        sides = [self.typed(node.left), self.typed(node.right)]
        for one, other in (sides, sides[::-1]):
            absent = other.null or other.text in ('""', "''")
            if one.selector is not None and absent and may_be_absent(one.selector):
                text = self._has(one.selector)
                return TypedExpression(BOOL, text if node.operator == "!=" else f"!{text}")
        left, right = (side.type.name for side in sides)
        alike = left == right or (left in _NUMBERS and right in _NUMBERS)
        dyn = "dyn" in (left, right) or (any(s.null for s in sides) and all(s.type.nullable for s in sides))
        if "list" in (left, right) or not (alike or dyn):
            message = f"`{node.operator}` compares {describe(sides[0].type)} with {describe(sides[1].type)}"
            raise CelError(node.offset, message, _compare_fix(left, right))
        texts = [_text_or_empty(side, other) for side, other in (sides, sides[::-1])]
        return TypedExpression(BOOL, f"({texts[0]} {node.operator} {texts[1]})")

    def _ordered(self, node: cel_parser.BinaryNode) -> TypedExpression:
        left, right = self.typed(node.left), self.typed(node.right)
        names = {left.type.name, right.type.name}
        if not (names <= _NUMBERS or names <= {"string", "dyn"}):
            message = f"`{node.operator}` compares {describe(left.type)} with {describe(right.type)}"
            raise CelError(node.offset, message, _compare_fix(left.type.name, right.type.name))
        text = f"{left.text} {node.operator} {right.text}"
        present = [f"{side.text} != null" for side in (left, right) if side.type.nullable]
        return TypedExpression(BOOL, f"({' && '.join([*present, text])})")

    def _arithmetic(self, node: cel_parser.BinaryNode) -> TypedExpression:
        left, right = self.typed(node.left), self.typed(node.right)
        for side, part in ((left, node.left), (right, node.right)):
            if not (node.operator == "+" and side.type == STRING):
                _require_number(part, side)
        if left.type.name != right.type.name or (node.operator == "%" and left.type != INT):
            message = f"`{node.operator}` joins {describe(left.type)} and {describe(right.type)}"
            raise CelError(node.offset, message, "convert one of them with int(), double() or string()")
        return TypedExpression(left.type, f"({left.text} {node.operator} {right.text})")

    def _in(self, node: cel_parser.BinaryNode) -> TypedExpression:
        named = self._map_entry(node)
        if named is not None:
            return TypedExpression(BOOL, self._has(named))
        left, right = self.typed(node.left), self._list_operand(node.right, "`in`")
        item = right.type.item
        if left.type.name == "list":
            raise CelError(node.left.offset, "a list cannot be in a list", "test one value")
        if "dyn" not in (left.type.name, item) and left.type.name != item and not left.null:
            message = f"this is {describe(left.type)}, but the list has {item} values"
            raise CelError(node.left.offset, message, _compare_fix(left.type.name, item))
        found = f'({left.text} == null ? "" : {left.text})' if left.type == ANY and item == "string" else left.text
        return TypedExpression(BOOL, f"({found} in {right.text or self._items_of(right.selector)})")

    def _map_entry(self, node: cel_parser.BinaryNode) -> Selector | None:
        """The selector of the entry that `"name" in key.labels` tests."""
        selector = self._selector(node.right)
        if selector is None or selector.path or VARIABLES[selector.root][selector.field].name != "map":
            return None
        match node.left:
            case cel_parser.ConstantNode(type="string"):
                return entry_of(selector, evaluator.literal_value(node.left.text), node.left.offset)
        raise CelError(
            node.left.offset, f"the entry of `{selector.text}` must be a literal", 'write it in quotes: "name"'
        )

    def _list_operand(self, node: Node, where: str) -> TypedExpression:
        """A subexpression that must be a list. A list in the body has no text yet: that depends on the fields read."""
        selector = self._selector(node)
        if selector is not None and selector.root == "request" and selector.field == "body":
            return TypedExpression(schema.ITEMS, "", selector)
        typed = self.typed(node)
        if typed.type.name != "list":
            raise CelError(node.offset, f"{where} needs a list, but this is {describe(typed.type)}", "use a list")
        return typed

    def _items_of(self, selector: Selector | None, fields: tuple[str, ...] = ()) -> str:
        """The variable of a list in the body; only these fields of each item are passed to CEL."""
        assert selector is not None
        return self._variable(msgspec.structs.replace(selector, use="items", fields=fields))

    # --- functions ---

    def _call(self, node: cel_parser.CallNode) -> TypedExpression:
        known = _FUNCTIONS if node.receiver is None else _METHODS
        if node.name not in known:
            prefix = "" if node.receiver is None else "."
            raise CelError(
                node.offset, f"there is no function `{node.name[:40]}`", suggestion(node.name, known, prefix=prefix)
            )
        expected = 2 if node.name in _MACROS else 0 if node.receiver is not None and node.name == "size" else 1
        if len(node.args) != expected:
            message = f"`{node.name}` has {len(node.args)} arguments"
            raise CelError(node.offset, message, f"give {expected or 'none'}")
        if node.receiver is None and node.name in _CONVERSIONS:
            return self._conversion(node.name, node.args[0])
        if node.name == "has":
            return TypedExpression(BOOL, self._presence(node.args[0]))
        if node.name == "size":
            return self._size(node.args[0] if node.receiver is None else node.receiver)
        assert node.receiver is not None
        if node.name in _MACROS:
            return self._comprehension(node, node.receiver)
        return self._text_function(node, node.receiver)

    def _text_function(self, node: cel_parser.CallNode, receiver: Node) -> TypedExpression:
        where = f"`{node.name}` reads text"
        subject = self._require_type(receiver, STRING, where, "convert it with string()")
        argument = self._require_type(node.args[0], STRING, where, "write it in quotes")
        if node.name == "matches":
            check_pattern(node.args[0])
        return TypedExpression(BOOL, f"{subject}.{node.name}({argument})")

    def _conversion(self, name: str, value: Node) -> TypedExpression:
        to, empty = _CONVERSIONS[name]
        typed = self.typed(value)
        if typed.type.name == "list" or (typed.type.name == "bool" and name != "string"):
            raise CelError(value.offset, f"{name}() cannot convert {describe(typed.type)}", "give a number or text")
        if typed.null:
            raise CelError(value.offset, f"{name}() of null is constant", "remove it")
        text = f"{name}({typed.text})"
        if name != "string" and typed.type.name in ("string", "dyn"):
            text = f'({typed.text} == "" ? {empty} : {text})'
        if typed.type.nullable:
            text = f"({typed.text} == null ? {empty} : {text})"
        return TypedExpression(to, text)

    def _presence(self, node: Node) -> str:
        selector = self._selector(node)
        if selector is None:
            typed = self.typed(node)
            if self._macro is None or not typed.type.nullable:
                raise CelError(node.offset, "has() needs an entry", "name one, like has(key.labels.team)")
            return f"({typed.text} != null)"
        if not selector.path and VARIABLES[selector.root][selector.field].name == "map":
            raise CelError(node.offset, f"`{selector.text}` is always present", "name an entry of it")
        return self._has(selector)

    def _has(self, selector: Selector) -> str:
        return self._variable(msgspec.structs.replace(selector, use="has"))

    def _size(self, node: Node) -> TypedExpression:
        selector = self._selector(node)
        type_ = type_of(selector) if selector is not None else CelType("")
        if selector is None or type_.name not in ("string", "list", "dyn"):
            raise CelError(
                node.offset, "size() counts text or lists of a request, key or Deployment", "use one of them"
            )
        return TypedExpression(INT, self._variable(msgspec.structs.replace(selector, use="size")))

    def _comprehension(self, node: cel_parser.CallNode, receiver: Node) -> TypedExpression:
        if self._macro is not None:
            raise CelError(node.offset, f"`{node.name}` is inside another", "use one; nested ones cost too much")
        source = self._list_operand(receiver, f"`{node.name}`")
        match node.args[0]:
            case cel_parser.NameNode(name=name) if name not in VARIABLES:
                self._macro = _Macro(name, source.type.item)
            case other:
                raise CelError(
                    other.offset, "this is not a new name for the items", "write a new name first, like exists(m, …)"
                )
        condition = self.require_bool(node.args[1], f"the condition of `{node.name}`")
        fields, self._macro = tuple(sorted(self._macro.fields)), None
        text = source.text or self._items_of(source.selector, fields)
        return TypedExpression(BOOL, f"{text}.{node.name}(x, {condition})")

    # --- values that are read ---

    def _read(self, node: cel_parser.NameNode | cel_parser.FieldNode | cel_parser.IndexNode) -> TypedExpression:
        selector = self._selector(node)
        if selector is not None:
            type_ = type_of(selector)
            if type_.name == "map":
                fix = f'name an entry of it, like {selector.text}["name"]'
                raise CelError(node.offset, f"`{selector.text}` cannot be used as a whole", fix)
            return TypedExpression(type_, self._variable(selector), selector)
        match node:
            case cel_parser.NameNode():
                assert self._macro is not None
                return TypedExpression(ANY if self._macro.item == "dyn" else CelType(self._macro.item), "x")
            case cel_parser.FieldNode(base=cel_parser.NameNode(name=name)) if (
                self._macro is not None and name == self._macro.name
            ):
                if self._macro.item != "dyn":
                    raise CelError(
                        node.offset, f"`{name}` is {self._macro.item} and has no fields", f"use `{name}` itself"
                    )
                self._macro.fields[node.name] = None
                return TypedExpression(ANY, f"x.{node.name}")
        message = "only a field of a variable, label, header or body can be read"
        raise CelError(node.offset, message, "name the whole path, and for items of a list use exists()")

    def _selector(self, node: Node) -> Selector | None:
        """The selector of a path; None if it does not begin with a variable of `VARIABLES`."""
        return selector_of(node, self._forbidden, self._macro.name if self._macro is not None else "")

    def _variable(self, selector: Selector) -> str:
        return self.selectors.setdefault(selector, f"v{len(self.selectors)}")


def _text_or_empty(side: TypedExpression, other: TypedExpression) -> str:
    """The text of one side of a comparison; an absent value equals an empty text."""
    if side.type == ANY and other.type == STRING:
        return f'({side.text} == null ? "" : {side.text})'
    return side.text


def _require_number(node: Node, typed: TypedExpression) -> None:
    if typed.type.name not in ("int", "double") or typed.type.nullable:
        fix = "convert it with int() or double()"
        raise CelError(node.offset, f"a number is needed, but this is {describe(typed.type)}", fix)


def _compare_fix(left: str, right: str) -> str:
    if "list" in (left, right):
        return "test it with `in` or exists()"
    if "string" in (left, right) and {"int", "double"} & {left, right}:
        return "write the number forbidden quotes, or convert with int() or string()"
    if "null" in (left, right):
        return "remove the comparison: this is never absent"
    return "compare values of one type"
