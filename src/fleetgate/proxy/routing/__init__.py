"""A Snapshot prepared for requests: look-up tables, Deployment and Endpoint state."""
