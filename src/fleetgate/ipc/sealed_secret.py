"""Sealed secrets: AES-256-GCM under the data directory's key, bound to the name they are sealed for."""

import base64
import binascii
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32
_NONCE_BYTES = 12  # 96 bits, the size GCM is specified for; random, as far fewer than 2 ** 32 secrets are ever sealed
_PREFIX = "v1."


class UnsealFailed(ValueError):
    """The text is damaged, or was sealed with another key or for another name."""


def seal(value: str, key: bytes, aad: str) -> str:
    """Seal a secret for one name (`aad`); the same name is needed to open it."""
    nonce = os.urandom(_NONCE_BYTES)
    sealed = AESGCM(key).encrypt(nonce, value.encode(), aad.encode())
    return _PREFIX + base64.urlsafe_b64encode(nonce + sealed).decode()


def unseal(sealed: str, key: bytes, aad: str) -> str:
    """Open what `seal` made.

    Raises: `UnsealFailed` for damaged text, another key or another name.
    """
    if not sealed.startswith(_PREFIX):
        raise UnsealFailed(f"the sealed secret of {aad} is not in a known form")
    try:
        data = base64.b64decode(sealed[len(_PREFIX) :], altchars=b"-_", validate=True)
        return AESGCM(key).decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], aad.encode()).decode()
    except (binascii.Error, InvalidTag, ValueError) as error:
        raise UnsealFailed(f"the secret of {aad} does not open with this data directory's seal.key") from error
