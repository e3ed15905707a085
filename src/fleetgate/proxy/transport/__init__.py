"""The relay behind a narrow seam: in go a request's bytes and a peer, out come what the Exchange needs to know."""
