"""Fleetgate beside its peers on one machine in one run: CPU, latency and memory of each, as ratios."""
