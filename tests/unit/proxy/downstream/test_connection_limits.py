"""How many connections an address and a key may have, what bodies may hold, and what is shed."""

from pathlib import Path
from typing import Any, cast

import pytest

from fleetgate.ipc.event_spool import EventSpool
from fleetgate.ipc.log import Log
from fleetgate.ipc.shared_memory import WorkerCell
from fleetgate.proxy.downstream.connection_limits import BodyBudget, ConnectionLimits, LimitedConnection
from fleetgate.proxy.overload.notices import OperatorNotices
from fleetgate.proxy.overload.overload_manager import OverloadState
from tests.loopback.control_rig import board_of

QUIET = OverloadState(shed_share=0.0, bits=0, closes_idle=False, accepts=True, notices=())


class Connection:
    """A connection that limits look at."""

    request = None
    is_busy = False

    def __init__(self, address: str = "127.0.0.1", may_be_closed: bool = True) -> None:
        self.client_address, self.may_be_closed = address, may_be_closed
        self.done: list[str] = []

    def abort(self) -> None:
        self.done.append("abort")

    def close_if_idle(self) -> None:
        self.done.append("close")

    def close(self) -> None:
        self.done.append("close")

    def tick(self, now_s: float) -> None:
        self.done.append("tick")


class Door:
    """A listener."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def pause(self) -> None:
        self.done.append("pause")

    def resume(self) -> None:
        self.done.append("resume")


def limits(tmp_path: Path, connections_max: int = 100, ip_max: int = -1, key_max: int = 0) -> ConnectionLimits:
    notices = OperatorNotices(Log(worker=0), EventSpool(tmp_path), 0, lambda: 0.0)
    return ConnectionLimits(board_of(1), 0, connections_max, ip_max, key_max, BodyBudget(100, notices))


def code_of(made: ConnectionLimits, connection: LimitedConnection) -> str:
    rejected = made.connected(connection)
    return rejected.code if rejected is not None else ""


def test_too_many_of_a_public_address_are_refused_but_not_of_a_load_balancer(tmp_path: Path) -> None:
    made = limits(tmp_path, connections_max=10_000)
    assert not any(code_of(made, Connection("10.0.0.1")) for _ in range(600))
    codes = [code_of(made, Connection("8.8.8.8")) for _ in range(600)]
    assert codes.index("rate_limited") == 512 and all(codes[512:])


def test_the_addresses_of_one_customers_network_count_together(tmp_path: Path) -> None:
    made = limits(tmp_path, ip_max=1)
    assert not code_of(made, Connection("2001:db8::1")) and code_of(made, Connection("2001:db8::2"))
    assert not code_of(made, Connection("2001:db8:0:1::1"))
    assert not code_of(made, Connection("::ffff:10.0.0.1")) and code_of(made, Connection("10.0.0.1"))


def test_a_connection_that_ended_makes_room(tmp_path: Path) -> None:
    made, first = limits(tmp_path, ip_max=1, key_max=1), Connection()
    assert not code_of(made, first) and made.admits_key(first, "k")
    second = Connection()
    assert code_of(made, second) and not made.admits_key(second, "k") and made.admits_key(second, "other")
    made.disconnected(first)
    made.disconnected(second)
    assert made.count == 0 and not code_of(made, Connection()) and made.admits_key(Connection(), "k")


def test_a_full_worker_refuses_and_stops_accepting(tmp_path: Path) -> None:
    made, door = limits(tmp_path, connections_max=20), Door()
    made.pause_when_full(cast(Any, door))
    codes = [code_of(made, Connection()) for _ in range(20)]
    assert codes[:18] == [""] * 18 and codes[18:] == ["overloaded"] * 2 and door.done == ["pause"]
    assert made._shared.get(0, WorkerCell.CONNECTIONS) == 20
    made.apply(QUIET)
    assert door.done == ["pause", "resume"]


def test_idle_connections_are_closed_when_they_run_short(tmp_path: Path) -> None:
    made, idle, busy = limits(tmp_path), Connection(), Connection(may_be_closed=False)
    made.connected(idle)
    made.connected(busy)
    made.apply(OverloadState(shed_share=0.0, bits=0, closes_idle=True, accepts=None, notices=()))
    assert idle.done == ["close"] and not busy.done


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_that_is_shed_is_exact(tmp_path: Path, share: float) -> None:
    made = limits(tmp_path)
    made.apply(OverloadState(shed_share=share, bits=0, closes_idle=False, accepts=None, notices=()))
    assert sum(made.sheds() for _ in range(1000)) == 1000 * share


def test_the_budget_for_bodies_is_given_back(tmp_path: Path) -> None:
    bodies = limits(tmp_path).bodies
    assert bodies.hold(80) and not bodies.is_tight and not bodies.hold(21)
    assert [event.name for event in EventSpool(tmp_path).take()] == ["worker 0"]
    assert bodies.hold(20) and bodies.is_tight
    bodies.release(100)
    assert bodies.hold(100)
