"""docs/reference is what the tables in the code generate: `make docs-reference` writes it."""

import pytest

from fleetgate.control.api.reference_pages import PAGES, TABLES, WHOLE_FILES, renewed
from fleetgate.ipc.metrics_table import METRICS
from fleetgate.protocols.error_codes import ERRORS
from fleetgate.protocols.response_headers import RESPONSE_HEADERS
from tests.test_tidy import ROOT

REFERENCE = ROOT / "docs" / "reference"


@pytest.mark.parametrize("name", PAGES)
def test_generated_tables_are_current(name: str) -> None:
    page = (REFERENCE / name).read_text()
    assert page == renewed(page), "run `make docs-reference`"


@pytest.mark.parametrize("name", WHOLE_FILES)
def test_generated_files_are_current(name: str) -> None:
    assert (REFERENCE / name).read_text() == WHOLE_FILES[name](), "run `make docs-reference`"


def test_every_table_is_on_a_page_and_has_every_row() -> None:
    text = "".join((REFERENCE / name).read_text() for name in PAGES)
    assert all(f"<!-- generated: {name} -->" in text for name in TABLES)
    assert all(f"| `{name}` |" in text for name in METRICS)
    assert all(f"| {error.status} | `{error.code}` | {error.when} |" in text for error in ERRORS.values())
    assert all(f"| `{header.name}` |" in text for header in RESPONSE_HEADERS)


def test_only_marked_tables_are_replaced() -> None:
    page = "before\n<!-- generated: errors -->\nold\n<!-- end of errors -->\nafter\n"
    new = renewed(page)
    assert new.startswith("before\n") and new.endswith("after\n") and "old" not in new and renewed(new) == new
    with pytest.raises(KeyError):
        renewed("<!-- generated: nothing -->\n<!-- end of nothing -->\n")
