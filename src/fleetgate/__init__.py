"""Fleetgate: one stable endpoint in front of inference Deployments in any region, on any mix of GPUs."""

__version__ = "0.1.0"
