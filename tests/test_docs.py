"""Every link, anchor, file and test that the documentation names exists. No network."""

import re
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SOURCE = ROOT / "src" / "fleetgate"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
LINK = re.compile(r"(?<!!)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
MODULE = re.compile(r"`((?:[a-z_0-9]+/)*[a-z_0-9]+(?:\.py|/))`")
SOMETHING_ELSE = {"bin/", "site/"}  # folders that are not in the repository
DECISION = re.compile(r"\d{4}-[a-z0-9-]+\.md")


@cache
def text_of(page: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text())


@cache
def anchors_of(page: Path) -> frozenset[str]:
    """The anchors that MkDocs and GitHub give to a page's headings; a heading that comes again gets a number."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).strip()
        anchor = re.sub(r"[\s\-]+", "-", words)
        found |= {anchor} if anchor not in found else {f"{anchor}_1", f"{anchor}-1"}
    return frozenset(found)


def name_of(page: Path) -> str:
    """A page as a test's parameter shows it."""
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_anchors_that_exist(page: Path) -> None:
    dead = []
    for link in LINK.findall(CODE.sub("``", text_of(page))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        is_outside = page.is_relative_to(DOCS) and not target.is_relative_to(DOCS)  # not part of the site
        if not target.exists() or is_outside or (anchor and anchor not in anchors_of(target)):
            dead.append(link)
    assert not dead, f"{name_of(page)} links to {dead}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_modules_and_folders_that_are_named_exist(page: Path) -> None:
    """A path in backticks is one below src/fleetgate, the repository or the page's own folder."""
    if page.name == "CHANGELOG.md":  # it speaks of earlier versions
        return
    places = (SOURCE, ROOT, page.parent)
    missing = [
        path
        for path in MODULE.findall(text_of(page))
        if path not in SOMETHING_ELSE and not any((place / path).exists() for place in places)
    ]
    assert not missing, f"{name_of(page)} names {missing}"


def test_every_page_is_in_the_navigation_once() -> None:
    found: list[str] = []

    def collect(part: object) -> None:
        if isinstance(part, str):
            found.append(part)
        elif isinstance(part, list):
            for one in part:
                collect(one)
        elif isinstance(part, dict):
            for one in part.values():
                collect(one)

    collect(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(found) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_decisions_are_numbered_and_indexed() -> None:
    folder = DOCS / "decisions"
    names = sorted(path.name for path in folder.glob("*.md") if path.name != "index.md")
    assert [int(name[:4]) for name in names if DECISION.fullmatch(name)] == list(range(1, len(names) + 1))
    assert re.findall(r"\((\d{4}-[^)]+)\)", (folder / "index.md").read_text()) == names
    for name in names:
        text = (folder / name).read_text()
        assert text.startswith(f"# {int(name[:4])}. ")
        headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
        assert [one for one in headings if one != "Figures"] == ["Context", "Decision", "Consequences"], name


def test_tests_that_the_fault_table_names_exist() -> None:
    """`test_x`: row_1, row_2 names a file and parts of the names of tests in it."""
    files: dict[str, str] = {}  # several folders may have a file of one name
    for path in (ROOT / "tests").rglob("test_*.py"):
        files[path.stem] = files.get(path.stem, "") + path.read_text()
    missing = []
    for row in re.findall(r"^\|.*\|$", (DOCS / "reference" / "faults.md").read_text(), re.MULTILINE):
        proofs = row.rpartition(" |")[0].rpartition("| ")[2]
        for name, parts in re.findall(r"`(test_\w+)`(?:: ([\w, ]+))?", proofs):
            if name not in files:
                missing.append(name)
                continue
            names = " ".join(re.findall(r"def (test_\w+)", files[name]))
            wanted = [part for part in re.split(r", ", parts) if re.fullmatch(r"[a-z]\w+", part)]
            missing += [f"{name}: {part}" for part in wanted if part not in names]
    assert not missing
