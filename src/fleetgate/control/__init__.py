"""The control plane: API, store, Snapshot publisher, reconciler. It never carries traffic."""
