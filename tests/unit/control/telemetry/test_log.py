"""The control process's log has the shape of the others."""

import json
import subprocess
import sys

CODE = """
import logging, structlog
from fleetgate.control.telemetry.log import log_as_json
log = structlog.get_logger()
log_as_json()
log.info("published", version=7)
log.warning("spool_unreadable", reason="no space")
log.debug("hidden")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("request_failed", path=__import__("pathlib").Path("/x"))
logging.getLogger("uvicorn.error").error("cannot %s", "bind")
"""


def test_events_levels_and_messages() -> None:
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert not run.stdout
    published, unreadable, failed, uvicorn = (json.loads(line) for line in run.stderr.splitlines())
    at_ms = published.pop("at_ms")
    assert at_ms > 1.6e12
    assert published == {"level": "info", "event": "published", "version": 7, "message": "published"}
    assert (unreadable["level"], unreadable["message"], unreadable["reason"]) == ("warning", "no space", "no space")
    assert (failed["level"], failed["event"], failed["message"]) == ("error", "request_failed", "request failed")
    assert "ZeroDivisionError" in failed["exception"] and failed["path"] == "/x"
    assert (uvicorn["level"], uvicorn["event"], uvicorn["message"]) == ("error", "uvicorn.error", "cannot bind")
