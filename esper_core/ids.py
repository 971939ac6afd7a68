"""Identifiers: time-ordered for things that happen, content digests for things that are.

Events, runs, seeds and decisions get a UUIDv7-shaped id, so that ids sort by creation and index well; blueprints and
kernels are named by the SHA-256 of their canonical bytes, so that equal things have equal names everywhere.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import uuid

from esper_core.errors import InvalidInput

DIGEST = re.compile(r"^[a-z]+-[0-9a-f]{64}$")
NAME = re.compile(r"^[a-z0-9][a-z0-9-]{0,62}$")


def new_id() -> str:
    """A fresh UUIDv7 (RFC 9562 §5.7) as text: 48 bits of milliseconds, then randomness."""
    value = bytearray(int(time.time() * 1000).to_bytes(6, "big") + os.urandom(10))
    value[6] = (value[6] & 0x0F) | 0x70
    value[8] = (value[8] & 0x3F) | 0x80
    return str(uuid.UUID(bytes=bytes(value)))


def sha256(data: bytes) -> str:
    """Hex SHA-256 of ``data`` (64 characters)."""
    return hashlib.sha256(data).hexdigest()


def content_id(kind: str, data: bytes) -> str:
    """``kind-<sha256>``: the name of an immutable thing, for example ``blueprint-3f…``."""
    return f"{kind}-{sha256(data)}"


def check_name(name: str, what: str) -> str:
    """Return ``name`` when it may stand in a subject, a path and a URL.

    Raises:
        InvalidInput: when it is not 1–63 of a–z, 0–9 and ``-``, beginning with a letter or digit.
    """
    if not NAME.fullmatch(name):
        raise InvalidInput(
            f"{what} {name!r} is not a valid name", hint="use 1-63 characters of a-z, 0-9 and '-', e.g. digits-1"
        )
    return name
