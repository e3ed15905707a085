"""Trace simulation: engines and a network with a simulated clock around the production core."""
