"""Sealed secrets: AES-256-GCM with the key of the data directory, each bound to the name of its resource."""

import base64
import binascii
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32
_NONCE_BYTES = 12  # 96 bits, as GCM specifies; random, because far fewer than 2 ** 32 secrets are ever sealed
_PREFIX = "v1."


class UnsealFailed(ValueError):
    """The text is damaged, or was sealed with another key or for another name."""


def seal(value: str, key: bytes, aad: str) -> str:
    """Seal a secret for a name (`aad`); `unseal` needs the same name."""
    nonce = os.urandom(_NONCE_BYTES)
    sealed = AESGCM(key).encrypt(nonce, value.encode(), aad.encode())
    return _PREFIX + base64.urlsafe_b64encode(nonce + sealed).decode()


def unseal(sealed: str, key: bytes, aad: str) -> str:
    """Return the secret that `seal` sealed.

    Raises: `UnsealFailed` for damaged text, another key or another name.
    """
    if not sealed.startswith(_PREFIX):
        raise UnsealFailed(f"the sealed secret of {aad} has an unknown form; set the Secret again")
    try:
        data = base64.b64decode(sealed[len(_PREFIX) :], altchars=b"-_", validate=True)
        return AESGCM(key).decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], aad.encode()).decode()
    except (binascii.Error, InvalidTag, ValueError) as error:
        reason = "was sealed with another key than seal.key of this data directory"
        raise UnsealFailed(f"the secret of {aad} {reason}; set the Secret again") from error
