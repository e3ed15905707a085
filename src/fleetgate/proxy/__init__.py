"""The data plane: listens, asks the core, relays. It never opens the database and never waits for the control plane."""
