"""Bytes to events and back, without I/O. `clients/` has one file a client protocol, `engines/` one file an engine."""
