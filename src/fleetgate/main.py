"""The `fleetgate` command: the one module that may import every part, and so the one that puts them together."""

import sys

from fleetgate import __version__


def main() -> None:
    """Say which version this is; the commands follow with the parts they need."""
    sys.stdout.write(f"fleetgate {__version__}\n")
