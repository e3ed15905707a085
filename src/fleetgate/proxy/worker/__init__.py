"""The worker process: wires all services and runs the event loop."""
