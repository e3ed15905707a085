"""Takes a new Snapshot into use: signature, canary worker, rollback."""
