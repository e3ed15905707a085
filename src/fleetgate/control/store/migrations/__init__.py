"""Migrations of the store, run at start; each is one file in `versions/`."""
