"""The calendar's clock jumps, by hand or by a time server: nothing that has to wait looks at it. FAULTS.md row 54."""

import time

import pytest

from tests.loopback.wall_client import request
from tests.loopback.wall_rig import plane
from tests.waiting import wait_for

AFTER_S = 3.0  # since the worker's start
_TIME = "worker.sys.modules['time']"


def jumps(by_s: float) -> dict[str, float | str]:
    """Let a worker's calendar jump while it runs."""
    moved = f"real() + ({by_s} if {_TIME}.monotonic() > begun_s + {AFTER_S} else 0.0)"
    return {f"{_TIME}.time": f"(lambda real, begun_s: lambda: {moved})({_TIME}.time, {_TIME}.monotonic())"}


@pytest.mark.parametrize("by_s", [3600.0, -3600.0])
def test_row_54_a_jump_of_the_calendar_ends_and_holds_up_nothing(by_s: float) -> None:
    with plane(workers=2, walls=2, patience=jumps(by_s)) as made:
        made.use({}, {})
        begun_s, count = time.monotonic(), 0
        while time.monotonic() - begun_s < AFTER_S + 3.0:
            for stream in (True, False):
                answer = made.ask(request("ok", stream))
                assert answer.status == 200 and (not stream or answer.whole), answer
                count += 1
        dates = made.ask(request("ok")).headers["date"]
        moved = time.strftime("%d %b %Y %H:", time.gmtime(time.time() + by_s))
        assert moved in dates  # it did jump
        made.wait_idle()
        wait_for(lambda: made.in_flight() == 0)
        assert count > 20
        assert len(made.seen(0)) + len(made.seen(1)) == count + 1  # nobody was asked twice
