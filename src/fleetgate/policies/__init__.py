"""Policies: expressions in CEL, checked when they are written and compiled once per Snapshot."""
