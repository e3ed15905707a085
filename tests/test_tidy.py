"""The house rules that a machine can check: sizes, names, places."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "fleetgate"
FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 60
PARAMETERS_MAX = 6
ONE_FILE_EACH = ("core/routing/strategies", "protocols/clients", "protocols/engines", "providers")


def python_files() -> list[Path]:
    """All our Python files."""
    return sorted(
        path
        for top in ("src", "tests", "bench")
        for path in (ROOT / top).rglob("*.py")
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    )


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_files_are_short() -> None:
    long = {
        str(path): lines for path in python_files() if (lines := len(path.read_text().splitlines())) > FILE_LINES_MAX
    }
    assert not long, f"split by idea: {long}"


def test_functions_are_short() -> None:
    long = [
        f"{path}:{node.name}"
        for path in python_files()
        for node in functions(path)
        if (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES_MAX
    ]
    assert not long, f"over {FUNCTION_LINES_MAX} lines: {long}"


def test_functions_take_few_parameters() -> None:
    """Commands of the CLI are exempt: their parameters are the flags that a user sees."""
    exempt = (
        SOURCE / "cli",
        SOURCE / "demo",
        SOURCE / "simulator" / "command.py",
        SOURCE / "main.py",
        SOURCE / "engine" / "main.py",
        ROOT / "tests",
        ROOT / "bench",
    )
    many = [
        f"{path}:{node.name}"
        for path in python_files()
        if not any(path.is_relative_to(place) for place in exempt)
        for node in functions(path)
        if len(
            [
                a
                for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                if a.arg not in ("self", "cls")
            ]
        )
        > PARAMETERS_MAX
    ]
    assert not many, f"over {PARAMETERS_MAX} parameters: {many}"


def test_there_is_no_drawer_for_odds_and_ends() -> None:
    names = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    assert not [path for path in python_files() if path.name in names]


def test_public_names_of_the_core_are_documented() -> None:
    bare = [
        f"{path}:{node.name}"
        for place in ("core", "protocols")
        for path in (SOURCE / place).rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not bare, f"without a docstring: {bare}"


def test_imports_go_down_only() -> None:
    """The contracts in pyproject.toml, run as the check runs them."""
    run = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("folder", ONE_FILE_EACH)
def test_folders_of_one_file_each_hold_no_folders(folder: str) -> None:
    assert not [path for path in (SOURCE / folder).iterdir() if path.is_dir() and path.name != "__pycache__"]


def imported_by(path: Path) -> Iterator[str]:
    """The modules, and names of modules, that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_every_module_of_the_proxy_has_a_unit_test() -> None:
    """A module that only a rig of a test imports does not count."""
    modules = {
        ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)
        for path in (SOURCE / "proxy").rglob("*.py")
        if not path.name.startswith("__")
    }
    tested = {name for path in (ROOT / "tests" / "unit").rglob("test_*.py") for name in imported_by(path)}
    assert not modules - tested, "write a test under tests/unit that imports it"
