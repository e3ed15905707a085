"""The `fleetgate` commands that are clients of the API."""
