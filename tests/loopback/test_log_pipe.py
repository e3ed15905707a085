"""The worker's standard error is a full pipe: requests are served, the loop does not block, lost lines are counted."""

import time

from tests.faults.test_client_mistakes import breaks
from tests.loopback.wall_client import Client, request
from tests.loopback.wall_rig import plane
from tests.waiting import wait_for

FILL_STDERR = """
import os
read_end, write_end = os.pipe()
os.set_blocking(write_end, False)
try:
    while True:
        os.write(write_end, b"x" * 1024)
except BlockingIOError:
    pass
os.set_blocking(write_end, True)
os.dup2(write_end, 2)
"""
PATIENCE: dict[str, float | str] = {
    "fleetgate.__doc__": f"exec({FILL_STDERR!r})",
    "fleetgate.ipc.log.LineWriter.__init__.__defaults__": "(2_000,)",  # the backlog of the process log
    **breaks("fleetgate.protocols.clients.openai.parse_request", "b'boom' in self"),
}
DROPPED = 'fleetgate_log_lines_dropped_total{log="process"}'


def test_a_full_pipe_on_stderr_delays_no_request() -> None:
    with plane(patience=PATIENCE) as made:
        for _ in range(40):
            assert made.ask(request("ok", note="boom")).code == "internal_error"
        with Client(made.port) as client:
            started_s = time.monotonic()
            for _ in range(100):
                assert client.ask(request("ok")).status == 200
            assert time.monotonic() - started_s < 10.0
        wait_for(lambda: made.rig.board.series_totals().get(DROPPED, 0) >= 20)
        assert made.rig.board.series_totals()["fleetgate_loop_lags_total"] == 0
        started_s = time.monotonic()
        made.rig.processes[0].terminate()
        assert made.rig.processes[0].wait(15) == 0, "what cannot be written is left out at the end"
        assert time.monotonic() - started_s < 10.0
