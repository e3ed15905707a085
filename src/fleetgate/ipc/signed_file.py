"""Signed files: an Ed25519 signature over the whole file, so that a proxy accepts only what its control plane wrote."""

import base64
import binascii

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

# File names in the data directory.
SNAPSHOT = "snapshot"
LAST_GOOD = "snapshot.good"
PUBLIC_KEY = "signing.pub"
# The signature covers this prefix too, so a signature made for another purpose or format does not fit.
FORM = b"fleetgate-snapshot 1 "
_HEAD_BYTES_MAX = 200


class SignatureInvalid(ValueError):
    """The bytes were not written with the signing key; the text says what is wrong."""


def public_key(signing_key: bytes) -> bytes:
    """Return the public key of a signing key; proxies hold it.

    Raises: `ValueError` for a key of another length.
    """
    return Ed25519PrivateKey.from_private_bytes(signing_key).public_key().public_bytes_raw()


def sign(payload: bytes, signing_key: bytes, form: bytes = FORM) -> bytes:
    """Return a signed file: one line with form and signature, then the payload."""
    signature = Ed25519PrivateKey.from_private_bytes(signing_key).sign(form + payload)
    return form + base64.b64encode(signature) + b"\n" + payload


def verified(data: bytes, public_key: bytes, form: bytes = FORM) -> bytes:
    """Check a file that `sign` made, and return its payload.

    Raises: `SignatureInvalid`. Cost: 0.1 ms, and 1 ms a megabyte.
    """
    if not data:
        raise SignatureInvalid("it is empty")
    if not data.startswith(form):
        raise SignatureInvalid("it is not signed")
    end = data.find(b"\n", 0, _HEAD_BYTES_MAX)
    if end < 0:
        raise SignatureInvalid("its first line has no end")
    try:
        text = data[len(form) : end]
        signature = base64.b64decode(text, validate=True)
        if base64.b64encode(signature) != text:
            raise SignatureInvalid("its signature is damaged")  # base64 ignores some bits of the last letter
        payload = data[end + 1 :]
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, form + payload)
    except binascii.Error:
        raise SignatureInvalid("its signature is damaged") from None
    except InvalidSignature:
        raise SignatureInvalid("it was changed after it was signed, or signed with another key") from None
    return payload
