"""The routing table in use: replaced whole when a new Snapshot is activated, never edited."""

from fleetgate.proxy.routing.routing_table import RoutingTable


class ActiveTable:
    """Holds the table that requests use now."""

    __slots__ = ("current",)

    def __init__(self, table: RoutingTable) -> None:
        self.current = table

    def replace(self, table: RoutingTable) -> RoutingTable:
        """Use another table. Returns the one before."""
        before, self.current = self.current, table
        return before
