"""Old name of `fleetgate.engine`, which the workloads of existing Deployments may still start."""

import sys

from fleetgate.engine.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
