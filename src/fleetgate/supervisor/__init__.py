"""What `fleetgate up` runs: opens sockets and memory, starts, restarts and upgrades the other processes."""
