"""A library file from front to back: a tar archive that is written, and read, in exactly one way. See ``bundle``."""

from __future__ import annotations

import hashlib
import tarfile
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict, Field

from esper_core.errors import Corrupt, InvalidInput, Untrusted
from esper_core.ids import sha256
from esper_core.kernel.manifest import MAX_BLOB_BYTES

SIGNATURE = "signature.json"
BLOCK = 512
END = bytes(2 * BLOCK)
"""What ends a file."""
NAME = (
    r"^(blueprints/blueprint-[0-9a-f]{64}\.json|kernels/kernel-[0-9a-f]{64}\.json|natives/native-[0-9a-f]{64}\.json"
    r"|blobs/[0-9a-f]{64})$"
)
AGAIN = "get the file again from whoever exported it"


class Entry(BaseModel):
    """One file in the archive."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=NAME)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0, le=MAX_BLOB_BYTES)


def header(name: str, size: int) -> bytes:
    """The one header of an entry."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def padding(size: int) -> bytes:
    """What follows an entry of ``size`` bytes."""
    return bytes(-size % BLOCK)


class Tape:
    """The file from front to back."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def small(self, name: str, most: int) -> bytes:
        """An entry whose size only its header tells."""
        block = self._take(BLOCK)
        try:
            info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError):
            raise InvalidInput("this is no library file", hint="`esperctl library export` makes one") from None
        if info.name != name:
            if name == SIGNATURE:
                raise Untrusted(f"the file is not signed: it begins with {info.name[:80]!r}", hint=AGAIN)
            raise Corrupt(f"{info.name[:80]!r} stands where {name} belongs", hint=AGAIN)
        if not 0 < info.size <= most:
            raise InvalidInput(f"{name} of {info.size} bytes", hint=f"at most {most}")
        if block != header(name, info.size):
            raise Corrupt(f"the header of {name} was altered", hint=AGAIN)
        return self._data(info.size)

    def entry(self, entry: Entry) -> bytes:
        """The next entry, which must be this one."""
        self._head(entry)
        data = self._data(entry.bytes)
        if sha256(data) != entry.sha256:
            raise Corrupt(f"{entry.name} was altered", hint=AGAIN)
        return data

    def skim(self, entry: Entry) -> int:
        """As ``entry``, piece by piece; where its bytes begin."""
        self._head(entry)
        start, left, digest = self._file.tell(), entry.bytes, hashlib.sha256()
        while left:
            piece = self._take(min(left, 1 << 20))
            digest.update(piece)
            left -= len(piece)
        self._pad(entry.bytes)
        if digest.hexdigest() != entry.sha256:
            raise Corrupt(f"{entry.name} was altered", hint=AGAIN)
        return start

    def end(self) -> None:
        """Nothing may follow."""
        if self._take(len(END)) != END or self._file.read(1):
            raise Corrupt("there is more in the file than its index says", hint=AGAIN)

    def _head(self, entry: Entry) -> None:
        if self._take(BLOCK) != header(entry.name, entry.bytes):
            raise Corrupt(f"the header of {entry.name} was altered", hint=AGAIN)

    def _data(self, size: int) -> bytes:
        data = self._take(size)
        self._pad(size)
        return data

    def _pad(self, size: int) -> None:
        if any(self._take(-size % BLOCK)):
            raise Corrupt("something is hidden between two entries", hint=AGAIN)

    def _take(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise Corrupt(f"the file ends early, after {self._file.tell()} bytes", hint=AGAIN)
        return data
