"""The client's side of a connection: framing, authentication, policies, TLS."""
