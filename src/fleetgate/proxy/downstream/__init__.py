"""Client connections: framing, authentication, policies, limits, TLS."""
