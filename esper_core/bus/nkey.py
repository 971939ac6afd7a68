"""NATS's key pairs: an Ed25519 seed that its owner alone keeps, a public key that the server knows it by.

The text form is NATS's own, so that a seed also serves ``nats --nkey FILE``: prefix bytes, 32 bytes, CRC-16/XMODEM (low
byte first), in base32 without padding. ``S`` begins a seed, ``U`` a user (github.com/nats-io/nkeys).
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from esper_core.errors import Corrupt

_SEED, _USER = 18 << 3, 20 << 3  # five bits each: base32's S and U
_SEED_BYTES = bytes((_SEED | _USER >> 5, (_USER & 31) << 3))  # what is a seed, and of what


@dataclass(frozen=True)
class Nkey:
    """A user's key pair; shows its public half only."""

    public: str
    _private: Ed25519PrivateKey = field(repr=False, compare=False)

    @classmethod
    def read(cls, seed: str) -> Nkey:
        """The pair of a seed's text.

        Raises:
            Corrupt: it is no user's seed, or was altered.
        """
        try:
            raw = base64.b32decode(seed + "=" * (-len(seed) % 8))
        except ValueError:
            raw = b""
        if len(raw) != 36 or not raw.startswith(_SEED_BYTES):
            raise Corrupt("this is no seed of a NATS user", hint="a seed begins with SU and has 58 characters")
        if _text(raw[:-2]) != seed:
            raise Corrupt("the seed of a NATS user was altered", hint="its check sum does not match")
        private = Ed25519PrivateKey.from_private_bytes(raw[2:-2])
        public = private.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        return cls(_text(bytes((_USER,)) + public), private)

    def sign(self, nonce: str) -> bytes:
        """The proof that NATS asks for: base64 of the signature over the server's nonce."""
        return base64.b64encode(self._private.sign(nonce.encode()))


def new_seed() -> str:
    """A seed nobody has."""
    raw = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
    )
    return _text(_SEED_BYTES + raw)


def _text(raw: bytes) -> str:
    return base64.b32encode(raw + binascii.crc_hqx(raw, 0).to_bytes(2, "little")).rstrip(b"=").decode()
