"""docs/reference/health.md is what the table of transitions gives; run this module to write it again."""

from pathlib import Path

from fleetgate.core.health.circuit_breaker import TRANSITIONS, BreakerState, Signal
from fleetgate.core.health_page import SIGNALS, STATES, page

FILE = Path(__file__).parents[3] / "docs" / "reference" / "health.md"


def test_the_page_is_current() -> None:
    assert FILE.read_text() == page(), "write it again: python -m tests.unit.core.test_health_page"


def test_every_state_and_signal_has_a_text() -> None:
    assert set(STATES) == set(BreakerState) and set(SIGNALS) == set(Signal)
    assert page().count("\n| ") >= len(TRANSITIONS) + len(STATES)


if __name__ == "__main__":
    FILE.write_text(page())
