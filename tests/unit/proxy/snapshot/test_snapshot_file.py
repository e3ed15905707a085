"""What a proxy takes for a Snapshot: signed, whole, newer than any before, not empty by accident."""

import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetgate.core.model import SNAPSHOT_BYTES_MAX, Snapshot, encode_snapshot
from fleetgate.ipc.signed_file import LAST_GOOD, PUBLIC_KEY, SNAPSHOT, SignatureInvalid, public_key, sign, verified
from fleetgate.proxy.snapshot.snapshot_file import SnapshotFile
from tests.loopback.rig import deployment, gateway

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
MUTANTS = 10_000


def snapshot(version: int, **parts: object) -> Snapshot:
    fields = {"gateways": (gateway("one"),), "deployments": (deployment("one", 8001, 0),), **parts}
    return Snapshot(version=version, made_at_s=1.7e9, **fields)  # type: ignore[arg-type]


def signed(version: int, key: bytes = KEY, **parts: object) -> bytes:
    return sign(encode_snapshot(snapshot(version, **parts)), key)


@pytest.fixture
def file(tmp_path: Path) -> SnapshotFile:
    (tmp_path / PUBLIC_KEY).write_bytes(public_key(KEY))
    return SnapshotFile(tmp_path)


def put(tmp_path: Path, data: bytes) -> None:
    fresh = tmp_path / "fresh"
    fresh.write_bytes(data)
    fresh.rename(tmp_path / SNAPSHOT)


@given(st.binary(max_size=300))
def test_what_was_signed_is_read_back(payload: bytes) -> None:
    assert verified(sign(payload, KEY), public_key(KEY)) == payload


@given(st.binary(min_size=1, max_size=60), st.sampled_from([1, 2, 4, 8]))
def test_the_letter_with_bits_to_spare_is_no_exception(payload: bytes, bit: int) -> None:
    whole = bytearray(sign(payload, KEY))
    last = whole.index(b"=") - 1
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    whole[last] = alphabet[alphabet.index(whole[last]) ^ bit]
    with pytest.raises(SignatureInvalid):
        verified(bytes(whole), public_key(KEY))


@given(st.binary(min_size=1, max_size=60), st.data())
def test_one_changed_byte_is_noticed_wherever_it_is(payload: bytes, data: st.DataObject) -> None:
    whole = bytearray(sign(payload, KEY))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SignatureInvalid):
        verified(bytes(whole), public_key(KEY))


REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it is empty"),
    "unsigned": (encode_snapshot(snapshot(9)), "it is not signed"),
    "signed by another": (signed(9, OTHER_KEY), "signed with another key"),
    "cut": (signed(9)[:-1], "it was changed"),
    "longer": (signed(9) + b" ", "it was changed"),
    "older": (signed(3), "it is version 3, and version 5 was seen before"),
    "the same number again": (signed(5, egress_allow=("10.0.0.0/8",)), "it differs from the version 5"),
    "empty by accident": (signed(9, gateways=(), deployments=()), "no Gateway"),
    "not a Snapshot": (sign(b"[]", KEY), "object"),
    "version 0": (signed(0), "under 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_snapshot_that_is_not_fit_is_refused_with_a_sentence(tmp_path: Path, file: SnapshotFile, name: str) -> None:
    put(tmp_path, signed(5))
    assert file.changed() == snapshot(5)
    data, why = REFUSED[name]
    put(tmp_path, data)
    assert file.changed() is None
    assert why in file.refused and str(tmp_path / SNAPSHOT) in file.refused
    put(tmp_path, signed(10))
    assert file.changed() == snapshot(10) and not file.refused


def test_an_oversize_file_is_refused_unread(tmp_path: Path, file: SnapshotFile) -> None:
    with (tmp_path / SNAPSHOT).open("wb") as sparse:
        sparse.truncate(SNAPSHOT_BYTES_MAX + 1)
    assert file.changed() is None
    assert f"{SNAPSHOT_BYTES_MAX} is the maximum" in file.refused


def test_an_empty_snapshot_that_is_meant_is_taken(tmp_path: Path, file: SnapshotFile) -> None:
    put(tmp_path, signed(5, gateways=(), deployments=(), emptied=True))
    taken = file.changed()
    assert taken is not None and not taken.gateways


def test_the_key_it_is_checked_with_is_read_once(tmp_path: Path, file: SnapshotFile) -> None:
    put(tmp_path, signed(5))
    assert file.changed() is not None
    (tmp_path / PUBLIC_KEY).write_bytes(public_key(OTHER_KEY))
    put(tmp_path, signed(6, OTHER_KEY))
    assert file.changed() is None
    put(tmp_path, signed(7))
    assert file.changed() is not None


def test_the_copy_is_as_good_as_the_file_and_nothing_older_follows_it(tmp_path: Path, file: SnapshotFile) -> None:
    file.keep(signed(5), 5)
    assert (tmp_path / LAST_GOOD).stat().st_mode & 0o777 == 0o600
    later = SnapshotFile(tmp_path)
    put(tmp_path, signed(4))
    assert later.last_good() == snapshot(5)
    assert later.changed() is None and "version 5 was seen" in later.refused
    (tmp_path / LAST_GOOD).write_bytes(signed(5)[:-3])
    assert SnapshotFile(tmp_path).last_good() is None


def flip(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def take_out(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.randrange(1, 40)]


def put_in(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at:at] = rng.randbytes(rng.randrange(1, 40))


def repeat(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data) - 1)
    data += data[at : at + rng.randrange(1, 200)]


def newer_by_hand(data: bytearray, rng: random.Random) -> None:
    """What somebody with write access would try: only the version."""
    data[:] = data.replace(b'"version":5', b'"version":%d' % rng.randrange(6, 10**6))


def signed_by_another(data: bytearray, rng: random.Random) -> None:
    data[:] = signed(rng.randrange(6, 10**6), rng.randbytes(32))


def an_older_one(data: bytearray, rng: random.Random) -> None:
    data[:] = signed(rng.randrange(1, 5))


WAYS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    flip, cut, take_out, put_in, repeat, newer_by_hand, signed_by_another, an_older_one,
)  # fmt: skip


def test_of_ten_thousand_mutants_none_is_taken(tmp_path: Path, file: SnapshotFile) -> None:
    """FAULTS.md row 52. The last good one stays in use after each, and the next good one is taken after all."""
    good = signed(5)
    put(tmp_path, good)
    assert file.changed() == snapshot(5)
    rng = random.Random(52)
    path = tmp_path / SNAPSHOT
    for number in range(MUTANTS):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            rng.choice(WAYS)(data, rng) if len(data) > 2 else None
        if data == good:
            continue
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        file._seen = (0, 0, 0)  # a file system's clock is too coarse for so many changes
        assert file.changed() is None, f"mutant {number} was taken"
        assert file.refused
    put(tmp_path, signed(6))
    assert file.changed() == snapshot(6)


def test_the_mutants_would_be_taken_if_nobody_checked() -> None:
    """The test above can fail: without signatures many mutants are Snapshots."""
    rng, taken = random.Random(52), 0
    for _ in range(500):
        data = bytearray(encode_snapshot(snapshot(5)))
        rng.choice((flip, newer_by_hand))(data, rng)
        try:
            msgspec.json.decode(data, type=Snapshot)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
        taken += 1
    assert taken > 100
