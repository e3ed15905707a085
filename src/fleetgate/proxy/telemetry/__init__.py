"""Metrics, logs and the operations listener of a worker."""
