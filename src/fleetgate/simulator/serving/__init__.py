"""Simulated serving: engines that compute in steps, and the world of clock and network around them."""
