"""`fleetgate up`: opens sockets and shared memory; starts, restarts and upgrades the other processes."""
