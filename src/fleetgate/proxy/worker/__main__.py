"""`python -m fleetgate.proxy.worker`: one worker, as a supervisor starts it."""

from fleetgate.proxy.worker.worker import main

main()
