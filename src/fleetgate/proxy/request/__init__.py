"""One request: placement, attempts, the answer, what is recorded of it."""
