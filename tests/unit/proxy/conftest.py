"""A data plane in memory for each test that asks for one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.proxy.plane_rig import Plane, plane_in


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    with plane_in(tmp_path) as made:
        yield made
