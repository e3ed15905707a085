"""Key texts and sealed secrets: what was made opens, what was touched does not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetgate.core.api_keys import ID_BYTES, SECRET_BYTES, hmac_hex, mint_key, parse_key
from fleetgate.ipc.sealed_secret import UnsealFailed, seal, unseal

ENVS = st.from_regex(r"[a-z0-9]{1,16}", fullmatch=True)
IDS = st.binary(min_size=ID_BYTES, max_size=ID_BYTES)
SECRETS = st.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES)
SEAL_KEYS = st.binary(min_size=32, max_size=32)
TEXTS = st.text()


@given(ENVS, IDS, SECRETS)
def test_a_minted_key_is_read_back(env: str, id_bytes: bytes, secret_bytes: bytes) -> None:
    key = mint_key(env, id_bytes, secret_bytes)
    parsed = parse_key(key.encode())
    assert parsed is not None
    assert key.split("_")[:4] == ["fg", env, *parsed]
    assert (len(parsed[0]), len(parsed[1]), len(key.split("_")[4])) == (10, 43, 6)


@given(ENVS, IDS, SECRETS, st.data())
def test_a_key_with_one_other_byte_is_none(env: str, id_bytes: bytes, secret_bytes: bytes, data: st.DataObject) -> None:
    key = bytearray(mint_key(env, id_bytes, secret_bytes).encode())
    at = data.draw(st.integers(0, len(key) - 1))
    key[at] = data.draw(st.integers(0, 255).filter(lambda byte: byte != key[at]))
    assert parse_key(bytes(key)) is None


@given(st.binary(max_size=200))
def test_no_bytes_upset_the_reader(token: bytes) -> None:
    assert parse_key(token) is None


@given(ENVS, st.tuples(IDS, SECRETS), st.tuples(IDS, SECRETS))
def test_other_randomness_makes_another_key(env: str, one: tuple[bytes, bytes], two: tuple[bytes, bytes]) -> None:
    assert (mint_key(env, *one) == mint_key(env, *two)) == (
        one[1] == two[1] and int.from_bytes(one[0], "big") >> 6 == int.from_bytes(two[0], "big") >> 6
    )


@given(st.binary(max_size=64), st.text(alphabet="abcXYZ019", min_size=1), st.text(alphabet="abcXYZ019", min_size=1))
def test_the_hash_tells_secrets_apart_and_hides_them(pepper: bytes, one: str, two: str) -> None:
    assert (hmac_hex(pepper, one) == hmac_hex(pepper, two)) == (one == two)
    assert len(hmac_hex(pepper, one)) == 64


@pytest.mark.parametrize("env", ["", "Live", "a_b", "x" * 17])
def test_a_key_needs_a_plain_env(env: str) -> None:
    with pytest.raises(ValueError, match="env"):
        mint_key(env, b"i" * ID_BYTES, b"s" * SECRET_BYTES)


@given(TEXTS, SEAL_KEYS, TEXTS)
def test_what_is_sealed_opens_for_its_name(value: str, key: bytes, name: str) -> None:
    sealed = seal(value, key, name)
    assert unseal(sealed, key, name) == value
    assert seal(value, key, name) != sealed  # equal secrets must not look equal


@given(TEXTS, SEAL_KEYS, TEXTS, st.data())
def test_nothing_else_opens_it(value: str, key: bytes, name: str, data: st.DataObject) -> None:
    sealed = seal(value, key, name)
    other_key = data.draw(SEAL_KEYS.filter(lambda drawn: drawn != key))
    other_name = data.draw(TEXTS.filter(lambda drawn: drawn != name))
    at = data.draw(st.integers(0, len(sealed) - 1))
    damaged = (
        sealed[:at] + data.draw(st.characters(codec="ascii").filter(lambda char: char != sealed[at])) + sealed[at + 1 :]
    )
    for wrong in ((sealed, other_key, name), (sealed, key, other_name), (sealed[:at], key, name)):
        with pytest.raises(UnsealFailed):
            unseal(*wrong)
    try:
        assert unseal(damaged, key, name) == value  # the unused low bits of base64's last sign may differ
    except UnsealFailed:
        pass


@given(st.text())
def test_any_text_is_refused_as_a_seal(text: str) -> None:
    with pytest.raises(UnsealFailed):
        unseal(text, b"k" * 32, "name")
