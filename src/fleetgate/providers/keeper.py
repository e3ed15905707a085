"""Old name of `fleetgate.providers.local_shim`, which a running control process of an earlier version still starts."""

from fleetgate.providers.local_shim import main

if __name__ == "__main__":
    main()
