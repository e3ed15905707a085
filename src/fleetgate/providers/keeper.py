"""The earlier name of `fleetgate.providers.local_shim`; a control process of an earlier version still starts it."""

from fleetgate.providers.local_shim import main

if __name__ == "__main__":
    main()
