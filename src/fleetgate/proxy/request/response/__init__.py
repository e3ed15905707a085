"""What a request's client gets: heads, errors, the writer, and the connection as they use it."""
