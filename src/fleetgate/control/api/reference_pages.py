"""Generates the reference pages: `python -m fleetgate.control.api.reference_pages docs/reference`.

In a page, what is between `<!-- generated: NAME -->` and `<!-- end of NAME -->` is replaced; the rest is kept.
"""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fleetgate.control.api.openapi_file import description
from fleetgate.core import health_page
from fleetgate.ipc.metrics_table import METRICS, Metric
from fleetgate.protocols.error_codes import ERRORS
from fleetgate.protocols.response_headers import RESPONSE_HEADERS


def metrics_table() -> str:
    """The metrics, in the order of the code's table."""
    rows = [
        [
            f"`{metric.name}`",
            metric.kind.value,
            ", ".join(metric.labels),
            metric.unit,
            metric.listener,
            _meaning(metric),
        ]
        for metric in METRICS.values()
    ]
    return _table(["name", "type", "labels", "unit", "listener", "meaning"], rows)


def _meaning(metric: Metric) -> str:
    return f"`{metric.copy_of}` under OpenTelemetry's name" if metric.copy_of else metric.help.rstrip(".")


def errors_table() -> str:
    """The errors, by status and code."""
    ordered = sorted(ERRORS.values(), key=lambda error: (error.status, error.code))
    rows = [[str(error.status), f"`{error.code}`", error.when, error.retry] for error in ordered]
    return _table(["status", "code", "when", "what to do"], rows)


def headers_table() -> str:
    """The response headers."""
    rows = [[f"`{header.name}`", header.when, header.meaning] for header in RESPONSE_HEADERS]
    return _table(["header", "when", "meaning"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "metrics": metrics_table,
    "errors": errors_table,
    "response headers": headers_table,
}
WHOLE_FILES: dict[str, Callable[[], str]] = {"openapi.json": description, "health.md": health_page.page}
PAGES = ("metrics.md", "client-api.md")


def renewed(page: str) -> str:
    """A page with its tables generated again.

    Raises: `KeyError` for a table that there is not.
    """
    return re.sub(
        r"(<!-- generated: ([\w ]+) -->\n).*?(<!-- end of \2 -->\n)",
        lambda match: f"{match[1]}{TABLES[match[2]]()}{match[3]}",
        page,
        flags=re.DOTALL,
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main(directory: Path) -> None:
    """Write every generated page of the directory."""
    for name in PAGES:
        path = directory / name
        path.write_text(renewed(path.read_text()))
    for name, make in WHOLE_FILES.items():
        (directory / name).write_text(make())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
