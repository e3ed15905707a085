"""Old name of `fleetgate.control.process`, which a running supervisor of an earlier version still starts."""

import sys

from fleetgate.control.process import main

if __name__ == "__main__":
    sys.exit(main())
