"""Metrics, readiness and Events of the control process."""
