"""The REST API; each resource has a module."""
