"""The `fleetgate` commands: a client of the API."""
