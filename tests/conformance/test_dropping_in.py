"""One file adds a strategy or an engine: it is written, found, checked and used, and no other file is touched."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

import fleetgate
from fleetgate.core.model import Snapshot
from fleetgate.core.routing import strategies
from fleetgate.core.routing.route import Decision, model_routes, route
from fleetgate.core.routing.strategies import NO_TURN, CandidateState
from fleetgate.protocols import engines
from tests.conformance import test_engines, test_strategies
from tests.loopback.rig import deployment, gateway
from tests.loopback.wall import Line, Seen
from tests.loopback.wall_client import request
from tests.loopback.wall_rig import plane
from tests.properties.test_routing import situations
from tests.waiting import wait_for

STRATEGY = '''"""The last name first."""

from collections.abc import Sequence

from fleetgate.core.routing.strategies import Candidate, Load, Ranking, Turn


def order(candidates: Sequence[Candidate], load: Load, turn: Turn) -> Ranking:
    """Names in reverse."""
    return Ranking(sorted(candidates, key=lambda c: c.name, reverse=True), turn)
'''
ENGINE = '''"""An engine of another package."""

from fleetgate.protocols.engines import EngineSignals, metric_sum

HEALTH_PATH = "/alive"
METRICS_PATH = "/load"


def read(metrics: bytes) -> EngineSignals:
    """The requests that it runs."""
    busy = metric_sum(metrics, b"mine:busy")
    return EngineSignals(running=None if busy is None else int(busy))
'''


@pytest.fixture
def dropped(tmp_path: Path) -> Iterator[None]:
    """Both files in a folder that the packages look into for a while."""
    (tmp_path / "last_name.py").write_text(STRATEGY)
    folder = tmp_path / "engines"
    folder.mkdir()
    (folder / "my_engine.py").write_text(ENGINE)
    strategies.__path__.append(str(tmp_path))
    engines.__path__.append(str(folder))
    clear()
    yield
    strategies.__path__.remove(str(tmp_path))
    engines.__path__.remove(str(folder))
    clear()


def clear() -> None:
    for package in (strategies, engines):
        package.names.cache_clear()
        package.find.cache_clear()


@pytest.mark.usefixtures("dropped")
class TestDroppedIn:
    """Found, conforming, and used."""

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(situation=situations())
    def test_the_strategy_conforms(self, situation: test_strategies.Situation) -> None:
        assert "last_name" in strategies.names()
        strategy = strategies.find("last_name")
        test_strategies.check_answer(strategy, situation)
        test_strategies.check_order_of_writing(strategy, situation)

    def test_the_strategy_routes(self) -> None:
        made = Snapshot(
            version=1,
            made_at_s=0.0,
            gateways=(gateway("a", "b", strategy="last_name"),),
            deployments=(deployment("a", 1, 0), deployment("b", 1, 1)),
        )
        found = model_routes(made.gateways[0], made, "")["m"]
        decision = route(found, {0: CandidateState(0, 1.0), 1: CandidateState(0, 1.0)}, NO_TURN)
        assert isinstance(decision, Decision) and [c.name for c in decision.order] == ["b", "a"]

    def test_the_engine_conforms(self) -> None:
        engine = engines.find("my-engine")
        assert engine is not None and "my_engine" in engines.names()
        test_engines.check_shape(engine)
        for metrics in (b"", b"mine:busy 3\n", b"mine:busy +Inf\n", b"\xff" * 1000):
            test_engines.check_reading(engine, metrics)
        assert engine.read(b"mine:busy 3\n").running == 3


def test_a_worker_routes_and_probes_with_dropped_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the package with two files more, and nothing else changed, behind real sockets."""
    source = Path(fleetgate.__file__).parent
    copy = tmp_path / "fleetgate"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "core" / "routing" / "strategies" / "last_name.py").write_text(STRATEGY)
    (copy / "protocols" / "engines" / "my_engine.py").write_text(ENGINE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with plane(walls=2) as made:
        paths: list[str] = []

        def load(line: Line, seen: Seen) -> None:
            paths.append(seen.path)
            body = b"mine:busy 7\n" if seen.path == "/load" else b""
            line.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)

        for wall in made.walls:
            wall.on_get = load
        made.use({"engine": "my-engine"}, {"engine": "my-engine"}, strategy="last_name")
        names = [made.ask(request("ok")).headers["x-fleetgate-deployment"] for _ in range(6)]
        assert names == ["two"] * 6, "rank would have said `one`"
        wait_for(lambda: {"/alive", "/load"} <= set(paths))
