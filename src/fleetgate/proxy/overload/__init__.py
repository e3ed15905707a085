"""Protects a worker from memory pressure, too many connections and a blocked event loop."""
