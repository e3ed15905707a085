"""What a worker can run short of, as the bits of one cell of the board."""

from enum import IntFlag


class OverloadBits(IntFlag):
    """While any of these is set, some of what is new is refused so that what runs can end."""

    MEMORY = 1
    CONNECTIONS = 2
    BODIES = 4
