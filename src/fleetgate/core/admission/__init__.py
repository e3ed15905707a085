"""Who waits and who is let in: queue, ledger, leases, retry budget."""
