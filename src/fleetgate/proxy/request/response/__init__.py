"""The response to a client: heads, errors, the writer, and the connection as they use it."""
