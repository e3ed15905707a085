"""Bytes to events and back, without I/O: one file per client protocol, one per engine's load signals in `engines`."""
