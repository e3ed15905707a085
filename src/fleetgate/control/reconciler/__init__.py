"""Starts and stops the replicas of managed Deployments."""
