"""The spool's records on disk: length, CRC-32, then sequence, subject and envelope; big-endian throughout.

A segment is a run of such records and nothing else. Reading stops at the first record that is not whole: what lies
before it is good, what lies behind cannot be told from noise.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from esper_core.bus.subjects import MAX_MESSAGE

_FRAME = struct.Struct(">II")  # bytes of body, CRC-32 of body
_BODY = struct.Struct(">QH")  # sequence, bytes of subject
_MAX_BODY = MAX_MESSAGE + 1024


@dataclass(frozen=True)
class Record:
    """One spooled event.

    Attributes:
        sequence: its place in the spool, from 1, without gaps.
        subject: to publish on.
        data: the serialised envelope.
        end: offset in the segment just behind it.
    """

    sequence: int
    subject: str
    data: bytes
    end: int


def encode(sequence: int, subject: str, data: bytes) -> bytes:
    """The record's bytes."""
    name = subject.encode()
    body = _BODY.pack(sequence, len(name)) + name + data
    return _FRAME.pack(len(body), zlib.crc32(body)) + body


def decode(segment: bytes, offset: int = 0) -> Iterator[Record]:
    """The whole records in ``segment``; ``end`` counts from ``offset``, where ``segment`` begins in its file."""
    at = 0
    while at + _FRAME.size <= len(segment):
        size, crc = _FRAME.unpack_from(segment, at)
        body = segment[at + _FRAME.size : at + _FRAME.size + size]
        if not _BODY.size < size <= _MAX_BODY or len(body) < size or zlib.crc32(body) != crc:
            return
        sequence, named = _BODY.unpack_from(body)
        at += _FRAME.size + size
        data = body[_BODY.size + named :]
        yield Record(sequence, body[_BODY.size : _BODY.size + named].decode("utf-8", "replace"), data, offset + at)
