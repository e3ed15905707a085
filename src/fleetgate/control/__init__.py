"""The control plane: API, store, Snapshot publisher, reconciler. It carries no traffic."""
