"""The migrations of the store, which run at start; each is a file in `versions/`."""
