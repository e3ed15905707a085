"""Old name of `fleetgate.control.process`. A running supervisor of an earlier version still starts it."""

import sys

from fleetgate.control.process import main

if __name__ == "__main__":
    sys.exit(main())
