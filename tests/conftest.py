"""What every test has: examples that are the same in every run, and the machine for itself where it asks for it."""

import fcntl
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# A push must not fail for an example that nobody chose: FLEETGATE_EXPLORE=1 looks for new ones (`make explore`).
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("explore" if os.environ.get("FLEETGATE_EXPLORE") else "same")


@pytest.fixture(autouse=True)
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests run beside one another, those marked `alone` do not: they load the machine, or look at its clock.

    A turnstile in front of the room keeps others from filing past one that waits for an empty one.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    is_alone = request.node.get_closest_marker("alone") is not None
    with (folder / "turnstile").open("w") as turnstile, (folder / "room").open("w") as room:
        fcntl.flock(turnstile, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH)
        fcntl.flock(turnstile, fcntl.LOCK_UN)
        yield
