"""Activates new Snapshots: signature check, canary worker, rollback."""
