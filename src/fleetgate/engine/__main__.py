"""`python -m fleetgate.engine`: the simulated inference server."""

import sys

from fleetgate.engine.main import main

sys.exit(main(sys.argv[1:]))
