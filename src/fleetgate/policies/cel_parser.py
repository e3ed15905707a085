"""Parser for the part of CEL that can be type-checked before evaluation; every node has its offset in the text."""

import re
from collections.abc import Sequence

import msgspec

CHARS_MAX = 1024
NODES_MAX = 128  # with DEPTH_MAX it bounds the cost of an evaluation; a longer condition can be two policies
DEPTH_MAX = 24

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+|//[^\n]*)
    |(?P<text>[rR]?(?:"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'))
    |(?P<number>(?:0x[0-9a-fA-F]+|\d+\.\d+(?:[eE][+-]?\d+)?|\d+(?:[eE][+-]?\d+)?)(?![\w.]))
    |(?P<name>[A-Za-z_][A-Za-z0-9_]*)
    |(?P<symbol>&&|\|\||[=!<>]=|[-+*/%<>!?:.,()\[\]])""",
    re.VERBOSE,
)
_LEVELS: tuple[frozenset[str], ...] = (
    frozenset({"||"}),
    frozenset({"&&"}),
    frozenset({"==", "!=", "<", "<=", ">", ">=", "in"}),
    frozenset({"+", "-"}),
    frozenset({"*", "/", "%"}),
)
_RESERVED = frozenset(
    {"as", "break", "const", "continue", "else", "for", "function", "if", "import", "in", "let", "loop"}
    | {"namespace", "package", "return", "var", "void", "while"}
)


class CelError(Exception):
    """An error in an expression with its position and a fix. Shape: `offset` counts characters from 0."""

    def __init__(self, offset: int, message: str, fix: str) -> None:
        super().__init__(f"{message}; {fix}")
        self.offset = offset
        self.message = message
        self.fix = fix

    def position(self, source: str) -> str:
        """`column 9`, or `line 2 column 9` if the text has several lines; both count from 1."""
        line = source.count("\n", 0, self.offset) + 1
        column = self.offset - (source.rfind("\n", 0, self.offset) + 1) + 1
        return f"line {line} column {column}" if "\n" in source else f"column {column}"


class ConstantNode(msgspec.Struct, frozen=True):
    """A literal. Shape: `type` is CEL's name of its type, `text` its source text."""

    offset: int
    type: str
    text: str


class NameNode(msgspec.Struct, frozen=True):
    """A variable."""

    offset: int
    name: str


class FieldNode(msgspec.Struct, frozen=True):
    """`base.name`; `offset` is that of the name."""

    offset: int
    base: "Node"
    name: str


class IndexNode(msgspec.Struct, frozen=True):
    """`base[key]`; `offset` is that of the key."""

    offset: int
    base: "Node"
    key: "Node"


class UnaryNode(msgspec.Struct, frozen=True):
    """`!value` or `-value`."""

    offset: int
    operator: str
    value: "Node"


class BinaryNode(msgspec.Struct, frozen=True):
    """`left operator right`; `offset` is that of the operator."""

    offset: int
    operator: str
    left: "Node"
    right: "Node"


class ConditionalNode(msgspec.Struct, frozen=True):
    """`condition ? if_true : if_false`."""

    offset: int
    condition: "Node"
    if_true: "Node"
    if_false: "Node"


class ListNode(msgspec.Struct, frozen=True):
    """`[1, 2]`."""

    offset: int
    items: "tuple[Node, ...]"


class CallNode(msgspec.Struct, frozen=True):
    """`name(args)` or `receiver.name(args)`; `offset` is that of the name."""

    offset: int
    name: str
    receiver: "Node | None"
    args: "tuple[Node, ...]"


Node = ConstantNode | NameNode | FieldNode | IndexNode | UnaryNode | BinaryNode | ConditionalNode | ListNode | CallNode


class _Token(msgspec.Struct, frozen=True):
    kind: str  # text, number, name, symbol or end
    text: str
    offset: int


def parse(source: str) -> Node:
    """Parse an expression.

    Raises: `CelError`.
    """
    if len(source) > CHARS_MAX:
        fix = f"use at most {CHARS_MAX} characters, or write two policies"
        raise CelError(CHARS_MAX, f"the expression has {len(source)} characters", fix)
    return _Parser(source).parse()


def _tokens(source: str) -> Sequence[_Token]:
    found = []
    offset = 0
    while offset < len(source):
        match = _TOKEN.match(source, offset)
        if match is None or match.lastgroup is None:
            raise CelError(offset, f"{source[offset]!r} is not allowed here", _fix_for(source[offset]))
        if match.lastgroup != "space":
            found.append(_Token(match.lastgroup, match[0], offset))
        offset = match.end()
    return (*found, _Token("end", "the end", len(source)))


def _fix_for(char: str) -> str:
    match char:
        case '"' | "'":
            return "close the text with the same quote on the same line"
        case "=":
            return "compare with =="
        case "&" | "|":
            return "write && for and, || for or"
        case "{" | "}":
            return "a policy cannot contain a map; compare single fields"
        case _ if char.isdigit():
            return "write a number like 10, 0.5 or 1e6"
    return "remove it"


class _Parser:
    """A recursive descent over the tokens; each method reads one level of the cel_parser."""

    def __init__(self, source: str) -> None:
        self._tokens = _tokens(source)
        self._next = 0
        self._nodes = 0
        self._depth = 0

    def parse(self) -> Node:
        """Parse the whole text."""
        node = self._expression()
        if self._peek.kind != "end":
            raise self._unexpected("write && or || between two conditions")
        return node

    @property
    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        token = self._peek
        self._next += token.kind != "end"
        return token

    def _skip(self, symbol: str) -> bool:
        token = self._peek
        found = token.kind == "symbol" and token.text == symbol
        self._next += found
        return found

    def _expect(self, symbol: str, opened: str) -> None:
        if not self._skip(symbol):
            raise self._unexpected(f"{opened} needs `{symbol}` here")

    def _unexpected(self, fix: str) -> CelError:
        token = self._peek
        if token.kind == "end":
            return CelError(token.offset, "the expression is not complete", fix)
        return CelError(token.offset, f"`{token.text[:40]}` is not allowed here", fix)

    def _count(self, node: Node) -> Node:
        self._nodes += 1
        if self._nodes > NODES_MAX:
            raise CelError(
                node.offset, "the expression is too long", f"use at most {NODES_MAX} names, values and operators"
            )
        return node

    def _expression(self) -> Node:
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise CelError(
                self._peek.offset, f"the nesting is more than {DEPTH_MAX} deep", "write it as several policies"
            )
        node = self._level(0)
        offset = self._peek.offset
        if self._skip("?"):
            if_true = self._level(0)
            self._expect(":", "`?`")
            node = self._count(ConditionalNode(offset, node, if_true, self._expression()))
        self._depth -= 1
        return node

    def _level(self, level: int) -> Node:
        if level == len(_LEVELS):
            return self._unary()
        node = self._level(level + 1)
        while self._peek.kind in ("symbol", "name") and self._peek.text in _LEVELS[level]:
            operator = self._take()
            node = self._count(BinaryNode(operator.offset, operator.text, node, self._level(level + 1)))
        return node

    def _unary(self) -> Node:
        token = self._peek
        if token.kind == "symbol" and token.text in "!-":
            self._take()
            self._depth += 1
            if self._depth > DEPTH_MAX:
                raise CelError(
                    token.offset, f"the nesting is more than {DEPTH_MAX} deep", f"remove some `{token.text}`"
                )
            node = self._count(UnaryNode(token.offset, token.text, self._unary()))
            self._depth -= 1
            return node
        return self._member(self._primary())

    def _member(self, node: Node) -> Node:
        while True:
            if self._skip("."):
                name = self._identifier("write the name of a field or function after the dot")
                if self._skip("("):
                    node = self._count(CallNode(name.offset, name.text, node, self._list(")", f"`{name.text}(`")))
                else:
                    node = self._count(FieldNode(name.offset, node, name.text))
            elif self._skip("["):
                offset = self._peek.offset
                node = self._count(IndexNode(offset, node, self._expression()))
                self._expect("]", "`[`")
            else:
                return node

    def _identifier(self, fix: str) -> _Token:
        if self._peek.kind != "name" or self._peek.text in _RESERVED:
            raise self._unexpected(fix)
        return self._take()

    def _primary(self) -> Node:
        token = self._take()
        match token.kind, token.text:
            case "text", _:
                return self._count(ConstantNode(token.offset, "string", token.text))
            case "number", number:
                whole = number.startswith("0x") or number.isdigit()
                return self._count(ConstantNode(token.offset, "int" if whole else "double", number))
            case "name", "true" | "false":
                return self._count(ConstantNode(token.offset, "bool", token.text))
            case "name", "null":
                return self._count(ConstantNode(token.offset, "null", token.text))
            case "name", name if name not in _RESERVED:
                if self._skip("("):
                    return self._count(CallNode(token.offset, name, None, self._list(")", f"`{name}(`")))
                return self._count(NameNode(token.offset, name))
            case "symbol", "(":
                node = self._expression()
                self._expect(")", "`(`")
                return node
            case "symbol", "[":
                return self._count(ListNode(token.offset, self._list("]", "`[`")))
        self._next -= token.kind != "end"
        raise self._unexpected("a value is missing here: write a name, a number, a text in quotes or `(`")

    def _list(self, end: str, opened: str) -> tuple[Node, ...]:
        items: list[Node] = []
        while not self._skip(end):
            if items:
                self._expect(",", f"{opened} needs `{end}` or")
                if end == "]" and self._skip(end):
                    break
            items.append(self._expression())
        return tuple(items)
