"""Whether an Endpoint is healthy: from its traffic, from probes, from what other workers saw."""
