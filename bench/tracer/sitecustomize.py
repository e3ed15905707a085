"""Counts calls in a Fleetgate worker. Python imports a module of this name at start when its folder is in the path.

Every callback of the event loop is one entry. An entry whose first argument holds a request head begins a request; one
whose first argument holds one streamed event begins an event. What is called until the next of either belongs to it.
The package is found by its text, not by its names, so that any version can be counted.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

OUT = os.environ.get("FLEETGATE_FRAMES_OUT", "")
WORKER = "fleetgate.proxy.worker"
POLL_S = 0.05


class Tracer:
    """A profile function, the open segment and the finished ones."""

    def __init__(self) -> None:
        self.segments: list[tuple[str, int, int, list[str]]] = []
        self._depth = 0
        self._entry_depth = sys.maxsize  # the depth at which the event loop calls
        self._kind = ""
        self._frames: list[str] = []
        self._builtins: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Called by the interpreter for each call and return."""
        if event == "call":
            if self._depth <= self._entry_depth:
                self._on_entry(frame)
            self._depth += 1
            if self._kind:
                code = frame.f_code
                self._frames.append(f"{Path(code.co_filename).stem}.{code.co_qualname}")
        elif event == "return":
            self._depth -= 1
        elif event == "c_call" and self._kind:
            self._builtins.append(f"[{getattr(argument, '__qualname__', argument)}]")

    def _on_entry(self, frame: FrameType) -> None:
        code = frame.f_code
        data = frame.f_locals.get(code.co_varnames[1]) if code.co_argcount > 1 else None
        if not isinstance(data, bytes):
            return
        if data.startswith(b"POST /"):
            self._entry_depth = self._depth
            self._begin("request")
        elif data.count(b"data: ") == 1:
            self._begin("event")

    def _begin(self, kind: str) -> None:
        if self._kind:
            calls = [*self._frames, *self._builtins]
            self.segments.append((self._kind, len(self._frames), len(self._builtins), calls))
        self._kind, self._frames, self._builtins = kind, [], []


def _serve(tracer: Tracer) -> None:
    """Write the segments whenever the file `OUT.ask` appears, and forget them."""
    asked = Path(f"{OUT}.ask")
    while True:
        time.sleep(POLL_S)
        if asked.exists():
            segments, tracer.segments = tracer.segments, []
            Path(f"{OUT}.part").write_text(json.dumps(segments))
            asked.unlink()
            Path(f"{OUT}.part").rename(OUT)


if OUT and WORKER in " ".join(sys.orig_argv):
    _tracer = Tracer()
    threading.Thread(target=_serve, args=(_tracer,), daemon=True).start()
    sys.setprofile(_tracer)
