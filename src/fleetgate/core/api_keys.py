"""Client API keys as text: `fg_<env>_<keyid>_<secret>_<crc>`, made and parsed without I/O or randomness."""

import base64
import hmac
import re
import zlib

ID_BYTES = 7  # 50 of its 56 bits are used: with a million keys a collision of two ids is still unlikely
SECRET_BYTES = 32
ID_CHARS = 10
SECRET_CHARS = 43  # 62 ** 43 > 2 ** 256
CRC_CHARS = 6
_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ENV = re.compile(r"[a-z0-9]{1,16}")
_KEY = re.compile(rb"(fg_[a-z0-9]{1,16}_([a-z2-7]{10})_([0-9A-Za-z]{43}))_([0-9A-Za-z]{6})")


def mint_key(env: str, id_bytes: bytes, secret_bytes: bytes) -> str:
    """Make the text of a key from random bytes that the caller passes.

    Shape: `env` is 1 to 16 of a-z 0-9; `id_bytes` is `ID_BYTES` long, `secret_bytes` `SECRET_BYTES`.
    Raises: `ValueError` for other shapes.
    """
    if not _ENV.fullmatch(env):
        raise ValueError(f"env must be 1 to 16 characters of a-z and 0-9, not {env!r}")
    if len(id_bytes) != ID_BYTES or len(secret_bytes) != SECRET_BYTES:
        raise ValueError(f"id_bytes must be {ID_BYTES} bytes and secret_bytes {SECRET_BYTES} bytes long")
    key_id = base64.b32encode(id_bytes).decode().lower()[:ID_CHARS]
    head = f"fg_{env}_{key_id}_{_base62(int.from_bytes(secret_bytes, 'big'), SECRET_CHARS)}"
    return f"{head}_{_checksum(head.encode())}"


def parse_key(token: bytes) -> tuple[str, str] | None:
    """The id and the secret of a key; None if the text is not a key or its checksum does not match."""
    match = _KEY.fullmatch(token)
    if match is None or match[4].decode() != _checksum(match[1]):
        return None
    return match[2].decode(), match[3].decode()


def hmac_hex(pepper: bytes, secret: str) -> str:
    """The stored form of a secret: HMAC-SHA256 under the data directory's pepper, in hex."""
    return hmac.digest(pepper, secret.encode(), "sha256").hex()


def _checksum(head: bytes) -> str:
    return _base62(zlib.crc32(head), CRC_CHARS)


def _base62(number: int, width: int) -> str:
    digits = []
    for _ in range(width):
        number, digit = divmod(number, 62)
        digits.append(_BASE62[digit])
    return "".join(reversed(digits))
