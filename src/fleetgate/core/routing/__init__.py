"""Which Deployment takes a request: routes, strategies, affinity, the scheduler."""
