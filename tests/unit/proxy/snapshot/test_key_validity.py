"""Which keys are valid: revoked ones are not, and none is once the control plane was silent for too long."""

from pathlib import Path

import pytest

from fleetgate.core.model import Key, Snapshot
from fleetgate.ipc.revocation_list import REVOKED, Revocation, revoke
from fleetgate.ipc.shared_memory import ControlPlaneCell, SharedMemory
from fleetgate.ipc.signed_file import PUBLIC_KEY, public_key
from fleetgate.proxy.snapshot.key_validity import KeyValidity
from tests.loopback.control_rig import board_of

SIGNING_KEY = b"k" * 32
KEYS = (Key(id="a", name="a", secret_hmac=""), Key(id="b", name="b", secret_hmac=""))
SNAPSHOT = Snapshot(version=1, made_at_s=0.0, keys=KEYS)


@pytest.fixture
def shared() -> SharedMemory:
    return board_of(1)


def validity(tmp_path: Path, shared: SharedMemory, max_stale_s: float = 0.0) -> KeyValidity:
    (tmp_path / PUBLIC_KEY).write_bytes(public_key(SIGNING_KEY))
    made = KeyValidity(tmp_path, shared, max_stale_s)
    made.check(0.0)
    return made


def ids(made: KeyValidity) -> list[str]:
    return [key.id for key in made.usable(SNAPSHOT).keys]


def test_a_revoked_key_is_gone_at_the_next_check(tmp_path: Path, shared: SharedMemory) -> None:
    made = validity(tmp_path, shared)
    assert ids(made) == ["a", "b"] and not made.check(1.0)
    revoke(tmp_path / REVOKED, SIGNING_KEY, Revocation("a", "a", "op", 1.0))
    assert made.check(1.1) and ids(made) == ["b"] and not made.check(1.2)


def test_a_damaged_list_brings_no_key_back(tmp_path: Path, shared: SharedMemory) -> None:
    made = validity(tmp_path, shared)
    revoke(tmp_path / REVOKED, SIGNING_KEY, Revocation("a", "a", "op", 1.0))
    made.check(1.0)
    fresh = tmp_path / "fresh"
    fresh.write_bytes(b"damaged")
    fresh.rename(tmp_path / REVOKED)
    assert not made.check(2.0) and ids(made) == ["b"] and REVOKED in made.refused
    (tmp_path / REVOKED).unlink()
    revoke(tmp_path / REVOKED, SIGNING_KEY, Revocation("b", "b", "op", 1.0))
    assert made.check(3.0) and ids(made) == ["a"] and not made.refused


def test_after_too_long_a_silence_no_key_is_valid(tmp_path: Path, shared: SharedMemory) -> None:
    made = validity(tmp_path, shared, max_stale_s=10.0)
    shared.control_plane[ControlPlaneCell.HEARTBEAT_MS] = 5_000
    assert not made.check(15.0) and made.silent_s(15.0) == 10.0 and ids(made)
    assert made.check(15.1) and made.stale and not ids(made)
    shared.control_plane[ControlPlaneCell.HEARTBEAT_MS] = 15_000
    assert made.check(15.2) and not made.stale and ids(made) == ["a", "b"]


def test_without_a_limit_silence_changes_nothing(tmp_path: Path, shared: SharedMemory) -> None:
    made = validity(tmp_path, shared)
    assert not made.check(1e9) and ids(made) == ["a", "b"] and made.silent_s(1e9) == float("inf")
