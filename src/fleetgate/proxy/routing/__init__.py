"""A Snapshot prepared for requests: the routing table, and the state of Deployments and Endpoints."""
