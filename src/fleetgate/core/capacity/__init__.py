"""Capacity of Deployments: capacity units, latency prediction, limits and speeds learned online."""
