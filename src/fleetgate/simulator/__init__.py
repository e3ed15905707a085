"""Trace simulation: the production core with simulated engines, network and clock."""
