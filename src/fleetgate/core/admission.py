"""The waiting room of one model in one Gateway: requests wait here, never in an engine."""

from collections import deque

import msgspec


class Ticket(msgspec.Struct, eq=False):
    """One waiting request. `left` is set when it went on, gave up or timed out; it is then skipped."""

    deadline_s: float
    left: bool = False


class WaitingRoom:
    """First come, first served, every ticket with a deadline; the bound is the caller's, which shares it.

    Cost: O(1) a call, amortised.
    """

    __slots__ = ("_here", "_tickets")

    def __init__(self) -> None:
        self._tickets: deque[Ticket] = deque()
        self._here = 0

    def __len__(self) -> int:
        return self._here

    def __bool__(self) -> bool:
        return self._here > 0

    def join(self, ticket: Ticket, ahead: bool = False) -> None:
        """Wait behind all others, or, for a request that was moved here by a failure, ahead of them."""
        if ahead:
            self._tickets.appendleft(ticket)
        else:
            self._tickets.append(ticket)
        self._here += 1

    def leave(self, ticket: Ticket) -> None:
        """Stop waiting, wherever in the row; leaving twice does nothing."""
        if not ticket.left:
            ticket.left = True
            self._here -= 1

    def first(self) -> Ticket | None:
        """The one whose turn it is, without taking it."""
        while self._tickets and self._tickets[0].left:
            self._tickets.popleft()
        return self._tickets[0] if self._tickets else None
