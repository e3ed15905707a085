"""The house rules that a machine can check: sizes, names, places."""

import ast
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "fleetgate"
FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 60
PARAMETERS_MAX = 6
MODULES_MAX = 12
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


# Earlier names of modules, which said too little or had to be learned from us, and names that fit any content.
EARLIER_MODULES = """
account accounts answers applying asking asks board bodies body booking books bounds building calibrating checking
clairvoyant comparing confirming continuation conversation cutting datadir demo_fleet describe desk documents door
failures forecast freshness gate gauges guard guards harm harming hub injection learn learning leaving limits loading
looks members outlook overlap paper parsing paths patience patterns phases placing poison policing printing prober
race record recorder relay remainder replaying replies resimulating results resume_responses resume_tokens resuming
revoking ruleset running scoring sealing sending sentences shell shown shrinking signing simulate simulating speaking
spool standing strain succession suspects sweep terms tour_load values ward watching words
"""
NAMES_FOR_ANYTHING = frozenset({"common", "helpers", "misc", "util", "utils"})
# Earlier names of things in the data plane: each with the word to use.
OLD_WORDS = {
    "board": "shared memory",
    "booking": "reservation",
    "books": "work ledger",
    "conversation": "request handler",
    "desk": "scheduler",
    "door": "listener",
    "gate": "request authorizer",
    "guards": "overload manager",
    "hub": "the one service that is used",
    "lane": "model route",
    "outlook": "view",
    "seat": "capacity",
    "site": "Gateway",
    "standing": "status",
    "tables": "routing table",
    "told": "reported",
    "ward": "passive health checker",
    "wish": "schedule request",
}
OLD_WORDS_ALLOWED = {"board_fd"}  # a field that supervisors of earlier versions pass to a worker
# Public classes that share a name, and why. A resource and its value in the Snapshot share theirs by design.
SHARED_CLASS_NAMES = {"Attempt": "control/api/usage.py: the name is part of the API's schema"}
RESOURCE_AND_VALUE = {"control/resources/schema.py", "core/model.py"}


def source_lines() -> Iterator[tuple[Path, int, str]]:
    """Every line of the package, with its file and number."""
    for path in sorted(SOURCE.rglob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            yield path.relative_to(ROOT), number, line


def identifiers(path: Path) -> set[str]:
    """The names that a file defines or uses."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                names.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.keyword(arg=str(name)):
                names.add(name)
    return names


def words_of(identifier: str) -> list[str]:
    """The words of an identifier in either spelling."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier).lower().strip("_").split("_")


def test_no_module_has_an_earlier_or_an_empty_name() -> None:
    banned = [
        str(path.relative_to(ROOT))
        for path in python_files()
        if path.stem in NAMES_FOR_ANYTHING or (path.is_relative_to(SOURCE) and path.stem in EARLIER_MODULES.split())
    ]
    assert not banned, f"name the module after what it holds, in the field's words (ARCHITECTURE.md): {banned}"


def test_programs_are_not_spoken_of_as_people() -> None:
    pattern = re.compile(r"\b(who|whom|whose|nobody|somebody|everybody|anybody)\b", re.IGNORECASE)
    found = [f"{path}:{number}: {line.strip()}" for path, number, line in source_lines() if pattern.search(line)]
    assert not found, f"a program is `it`: name the client, the worker, the operator or the Endpoint: {found}"


def test_pages_that_the_source_cites_are_in_the_repository() -> None:
    pages = {path.name for path in ROOT.rglob("*.md") if not any(part.startswith(".") for part in path.parts)}
    cited = re.compile(r"\b[A-Za-z][\w.-]*\.md\b")
    found = [
        f"{path}:{number}: {page}"
        for path, number, line in source_lines()
        for page in cited.findall(line)
        if page not in pages
    ]
    assert not found, f"cite a page of docs/ or state the reason itself: {found}"


def test_no_two_public_classes_share_a_name() -> None:
    places: dict[str, set[str]] = defaultdict(set)
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].add(str(path.relative_to(SOURCE)))
    shared = {
        name: sorted(files)
        for name, files in places.items()
        if len(files) > 1 and files != RESOURCE_AND_VALUE and name not in SHARED_CLASS_NAMES
    }
    assert not shared, f"rename one of each, so that a name means one thing: {shared}"


def test_folders_hold_few_modules() -> None:
    """`control/api` is exempt: it has one module for each resource."""
    counts = Counter(path.parent for path in SOURCE.rglob("*.py") if path.name != "__init__.py")
    full = {
        str(folder.relative_to(SOURCE)): count
        for folder, count in counts.items()
        if count > MODULES_MAX and folder != SOURCE / "control" / "api"
    }
    assert not full, f"over {MODULES_MAX} modules; make a folder of those that belong together: {full}"


def test_no_import_is_for_type_checking_only() -> None:
    hidden = [f"{path}:{number}" for path, number, line in source_lines() if "TYPE_CHECKING" in line]
    assert not hidden, f"such an import hides a circle; move what both need below both: {hidden}"


@pytest.mark.parametrize("package", ["proxy", "core"])
def test_the_data_plane_has_no_earlier_words(package: str) -> None:
    found = {
        f"{path.relative_to(SOURCE)}: {name}": OLD_WORDS[word]
        for path in sorted((SOURCE / package).rglob("*.py"))
        for name in sorted(identifiers(path) - OLD_WORDS_ALLOWED)
        for word in words_of(name)
        if word in OLD_WORDS
    }
    assert not found, f"use the word of ARCHITECTURE.md: {found}"


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
