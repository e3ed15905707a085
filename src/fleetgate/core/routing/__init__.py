"""Routing of a request: routes, strategies, prefix affinity, the scheduler, recorded decisions."""
