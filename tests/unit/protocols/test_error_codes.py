"""The tables of errors and response headers: complete, and used by the code."""

import ast
import re
import string
from collections.abc import Iterator

import pytest

from fleetgate.protocols.error_codes import ERRORS, MESSAGES, ErrorCode
from fleetgate.protocols.response_headers import EXPOSED_HEADERS, RESPONSE_HEADERS
from tests.test_tidy import SOURCE

PAIRS = {(error.status, error.code) for error in ERRORS.values()}
PASSED_ON = {"MALFORMED_REQUEST", "UNKNOWN_EXPECT", "UNKNOWN_HTTP_VERSION", "INVALID_JSON", "INVALID_BODY"}
# Bytes that look like header lines and go to engines, or that injected faults pretend to get from them.
NOT_TO_CLIENTS = ("proxy/transport/fault_injection.py", "proxy/health")


def calls(*names: str) -> Iterator[tuple[str, ast.Call]]:
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
                yield str(path.relative_to(SOURCE)), node


def test_every_error_that_the_core_decides_is_in_the_table() -> None:
    decided = set()
    for _, call in calls("Refuse"):
        if len(call.args) >= 2:
            status, code = call.args[:2]
            assert isinstance(status, ast.Constant) and isinstance(code, ast.Constant)
            decided.add((status.value, code.value))
    assert decided <= PAIRS and {code for _, code in decided} <= set(MESSAGES)
    assert len(decided) > 8


def test_every_rejection_comes_from_the_table() -> None:
    literal = [
        (where, call.lineno)
        for where, call in calls("RequestRejected")
        if all(isinstance(each, ast.Constant) for each in call.args[:2]) and ast.literal_eval(call.args[1]) != "options"
    ]
    assert not literal, "make them from fleetgate/protocols/error_codes.py"


def test_statuses_of_parsers_are_in_the_table() -> None:
    statuses = {
        call.args[0].value
        for where, call in calls("Malformed")
        if call.args and isinstance(call.args[0], ast.Constant) and "upstream" not in ast.unparse(call)
    }
    known = {(status, "invalid_request") for status in statuses}
    assert known <= PAIRS | {(502, "invalid_request")}, "502 is of an engine's response, which no client sees"


def test_every_row_is_used() -> None:
    text = "".join(path.read_text() for path in SOURCE.rglob("*.py") if path.name != "error_codes.py")
    unused = [
        name
        for name, error in ERRORS.items()
        if name not in PASSED_ON and f"errors.{name}" not in text and MESSAGES.get(error.code) != error.message
    ]
    assert not unused


@pytest.mark.parametrize("name", ERRORS)
def test_rows_are_well_formed(name: str) -> None:
    error = ERRORS[name]
    assert 400 <= error.status < 600 and re.fullmatch(r"[a-z_]+", error.code)
    assert "|" not in error.when + error.retry and error.when
    fields = [field for _, field, _, _ in string.Formatter().parse(error.message) if field]
    if error in (ERRORS[each] for each in ERRORS if MESSAGES.get(ERRORS[each].code) == ERRORS[each].message):
        assert not fields, "errors after routing have no values"
    shown = ErrorCode.filled(error, **dict.fromkeys(fields, 1))
    assert shown[:2] == (error.status, error.code) and "{" not in shown[2]


def test_an_error_needs_all_its_values() -> None:
    with pytest.raises(KeyError):
        ERRORS["UNKNOWN_PATH"].filled()


def test_headers_that_the_proxy_writes_are_in_the_table() -> None:
    written: set[str] = set()
    for path in (SOURCE / "proxy").rglob("*.py"):
        where = str(path.relative_to(SOURCE))
        if not where.startswith(NOT_TO_CLIENTS):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, bytes):
                    lines = re.findall(rb"(?:^|\r\n|%b)([a-z][a-z-]+): ", node.value)
                    written.update(line.decode() for line in lines)
    names = {header.name for header in RESPONSE_HEADERS}
    assert written - {"data", "event"} <= names, "without a row"
    assert {name for name in names if not name.startswith("openai-")} <= written, "rows that no code writes"


def test_headers_for_pages_are_those_of_fleetgate() -> None:
    own = [header.name for header in RESPONSE_HEADERS if header.name.startswith("x-") and header.for_pages]
    assert EXPOSED_HEADERS.decode().split(", ") == own and "x-request-id" in own


def test_a_stream_that_breaks_has_a_message() -> None:
    assert "upstream_interrupted" in MESSAGES
