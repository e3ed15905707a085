"""The log of the control process: structlog's events in the same JSON lines as those of workers and supervisor."""

from collections.abc import MutableMapping
from typing import Any, NoReturn

import structlog

from fleetgate.ipc.log import Level, Log

LOG = Log()
_LEVELS = {"critical": Level.ERROR, "exception": Level.ERROR, "warn": Level.WARNING}


def log_as_json() -> None:
    """Send structlog's events, `logging` and the traceback of a crash to the process's log."""
    structlog.configure(processors=[structlog.processors.format_exc_info, _write])
    LOG.take_over()


def _write(_: Any, method: str, fields: MutableMapping[str, Any]) -> NoReturn:
    """Write one event. Its message is the field `message`, `reason` or `sentence`, or the event's name."""
    event = str(fields.pop("event"))
    message = fields.pop("message", "") or fields.get("reason") or fields.get("sentence") or event.replace("_", " ")
    level = _LEVELS[method] if method in _LEVELS else Level[method.upper()]
    LOG.write(level, event, str(message), **fields)
    raise structlog.DropEvent  # nothing is left for structlog's own printer, which would block
