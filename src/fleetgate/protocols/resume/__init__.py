"""Continuing a stream that broke off at another Endpoint: transcript, comparison, prefill, token ids."""
