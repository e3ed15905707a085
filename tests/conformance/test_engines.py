"""Every engine file in the folder, a dropped-in one included, reads whatever comes and never fails."""

import inspect
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetgate.protocols import engines
from fleetgate.protocols.engines import EngineSignals

NUMBERS = ["0", "1", "2.0", "-1", "1e3", "NaN", "+Inf", "-Inf", "e", "", "1e400", "9" * 400, "0x5", "1 1700000000"]


def check_shape(engine: ModuleType) -> None:
    """Two paths from the server's root and a documented function."""
    for path in (engine.HEALTH_PATH, engine.METRICS_PATH):
        assert path == "" or (path.startswith("/") and " " not in path and "\r" not in path)
    assert inspect.getdoc(engine) and inspect.getdoc(engine.read)
    assert list(inspect.signature(engine.read).parameters) == ["metrics"]


def check_reading(engine: ModuleType, metrics: bytes) -> None:
    """Signals or nothing: numbers that fit the cells of shared memory."""
    signals = engine.read(metrics)
    assert isinstance(signals, EngineSignals)
    for count in (signals.running, signals.waiting):
        assert count is None or (isinstance(count, int) and abs(count) < 2**62)
    assert signals.kv_ratio is None or abs(signals.kv_ratio) < 2**50
    assert engine.read(metrics) == signals


def metric_names(engine: ModuleType) -> list[str]:
    """The names that a file looks for, from its source: what garbage is made of."""
    source = inspect.getsource(engine)
    return [part for part in source.replace("'", '"').split('"') if ":" in part and " " not in part] or ["load"]


@pytest.mark.parametrize("name", engines.names())
class TestEveryEngine:
    """The suite that a new file must pass; nothing else names it."""

    def test_it_has_the_shape(self, name: str) -> None:
        engine = engines.find(name)
        assert engine is not None
        check_shape(engine)

    def test_nothing_is_nothing(self, name: str) -> None:
        engine = engines.find(name)
        assert engine is not None
        assert engine.read(b"") == EngineSignals()
        assert engine.read(b"<html>404 page not found</html>") == EngineSignals()

    @given(data=st.data())
    def test_it_stands_whatever_an_engine_says(self, name: str, data: st.DataObject) -> None:
        engine = engines.find(name)
        assert engine is not None
        names = st.sampled_from(metric_names(engine))
        labels = st.sampled_from(["", "{}", '{a="b"}', '{a="} 5",b="c"}', "{"])
        line = st.builds("{}{} {}".format, names, labels, st.sampled_from(NUMBERS)).map(str.encode) | st.binary(
            max_size=40
        )
        check_reading(engine, b"\n".join(data.draw(st.lists(line, max_size=8))))

    def test_it_stands_a_huge_text(self, name: str) -> None:
        engine = engines.find(name)
        assert engine is not None
        rows = (f'{metric}{{n="{n}"}} 1\n' for n in range(20_000) for metric in metric_names(engine))
        check_reading(engine, "".join(rows).encode() + b"x" * 1_000_000)


def test_a_name_with_a_dash_is_a_file_with_an_underscore() -> None:
    assert engines.find("tensorrt-llm") is engines.find("tensorrt_llm")
