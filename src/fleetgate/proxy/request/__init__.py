"""One request: placement, attempts, the response, and its records."""
