"""Build the signed Snapshot from the stored resources."""
