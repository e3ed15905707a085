"""From stored resources to the signed Snapshot that workers use."""
