"""What a Deployment can take: capacity units, latency prediction, limits learned online."""
