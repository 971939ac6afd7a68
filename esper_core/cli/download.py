"""A kernel from the library into two files: the blob, and its record as JSON beside it.

What has arrived is kept in ``<file>.part``, so that a broken stream, or a broken run of this command, goes on where it
stopped. Nothing gets its final name before its digest is right. Says nothing about trust: that is ``verify``'s part.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf import json_format

from esper_core.errors import Corrupt, InvalidInput, NotFound, Unavailable
from esper_core.pb.esper.core.v1.kernel_pb2 import KernelRecord
from esper_core.pb.esper.urza.v1 import native_pb2, urza_pb2

if TYPE_CHECKING:
    from esper_core.cli.platform import Platform
    from esper_core.kernel.native import NativeRecord

TRIES = 5
"""Broken streams in a row, without a byte in between, until it is given up."""
_PAUSE = 1.0


class Part:
    """The bytes that have arrived so far, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def append(self, data: bytes) -> None:
        """Add the next bytes.

        Raises:
            InvalidInput: the place cannot be written.
        """
        try:
            with self.path.open("ab") as file:
                file.write(data)
        except OSError as error:
            raise unwritable(self.path, error) from None

    def digest(self) -> str:
        """Hex SHA-256 of all of it."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def unwritable(path: Path, error: OSError) -> InvalidInput:
    """That a file cannot be written, in words."""
    return InvalidInput(f"{path} cannot be written: {error.strerror}", hint="choose another folder with --to")


def record_path(blob: Path) -> Path:
    """Where the record of the kernel in ``blob`` lies."""
    return blob.with_suffix(".json")


async def download(platform: Platform, record: KernelRecord, blob: Path, arrived: Callable[[int], None]) -> bool:
    """Bring the kernel of ``record`` to ``blob``, and its record to ``record_path(blob)``.

    Args:
        platform: where from.
        record: the kernel as the library knows it.
        blob: the file to make; when it is there with the right digest nothing is fetched.
        arrived: called with the bytes had so far.

    Returns:
        Whether anything had to be fetched.

    Raises:
        Corrupt: what came does not match its digest; it is thrown away.
        Unavailable: the stream broke again and again; what came is kept.
        InvalidInput: the place cannot be written.
    """
    manifest = record.manifest
    fetched = False
    if Part(blob).size != manifest.blob_bytes or Part(blob).digest() != manifest.blob_sha256:
        part = Part(blob.with_name(blob.name + ".part"))
        if part.size > manifest.blob_bytes:
            part.path.unlink()
        await _fill(platform, record, part, arrived)
        if part.digest() != manifest.blob_sha256:
            part.path.unlink()
            raise Corrupt(f"{manifest.kernel_id}: the bytes do not match their digest", hint="pull it again")
        os.replace(part.path, blob)
        fetched = True
    try:
        record_path(blob).write_text(json_format.MessageToJson(record, preserving_proto_field_name=True))
    except OSError as error:
        raise unwritable(record_path(blob), error) from None
    return fetched


async def _fill(platform: Platform, record: KernelRecord, part: Part, arrived: Callable[[int], None]) -> None:
    kernel_id, wanted = record.manifest.kernel_id, record.manifest.blob_bytes
    part.append(b"")
    failures = 0
    while part.size < wanted:
        before = part.size
        try:
            async for data in chunks(platform, kernel_id, part.size):
                part.append(data)
                arrived(part.size)
                if part.size > wanted:
                    part.path.unlink()
                    raise Corrupt(f"{kernel_id}: more bytes came than it has", hint="pull it again")
        except Unavailable:
            failures = 1 if part.size > before else failures + 1
            if failures >= TRIES:
                raise
            await asyncio.sleep(_PAUSE)
        else:
            if part.size < wanted:
                raise Corrupt(
                    f"{kernel_id}: the stream ended after {part.size} of {wanted} bytes", hint="pull it again"
                )


async def chunks(platform: Platform, kernel_id: str, offset: int = 0) -> AsyncIterator[bytes]:
    """The blob's bytes from ``offset``, each piece checked against its place and digest.

    Raises:
        Corrupt: a piece is out of place or damaged.
        EsperError: what the library answers.
    """
    position = offset
    async for piece in platform.urza.StreamKernel(urza_pb2.StreamKernelRequest(kernel_id=kernel_id, offset=offset)):
        if piece.WhichOneof("part") != "chunk":
            continue
        chunk = piece.chunk
        if chunk.offset != position or hashlib.sha256(chunk.data).hexdigest() != chunk.sha256:
            raise Corrupt(f"{kernel_id}: damaged on the way at byte {position}", hint="pull it again")
        yield chunk.data
        position += len(chunk.data)


async def native_chunks(platform: Platform, record: NativeRecord) -> AsyncIterator[bytes]:
    """The bytes of a native part; whoever gets them compares their digest.

    Raises:
        EsperError: what the library answers.
    """
    request = native_pb2.StreamNativeRequest(
        kernel_id=record.kernel_id, target=record.target, toolchain=record.toolchain
    )
    async for piece in platform.urza.StreamNative(request):
        if piece.WhichOneof("part") == "chunk":
            yield piece.chunk


def read_local(path: Path) -> tuple[KernelRecord, bytes]:
    """A pulled kernel: its record and its blob, unchecked.

    Raises:
        NotFound: one of the two files is missing.
        Corrupt: the record is not readable.
    """
    try:
        blob = path.read_bytes()
        text = record_path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NotFound(f"no file {error.filename}", hint="blob and record lie side by side after a pull") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Corrupt(f"{path} cannot be read: {error}", hint="pull it again") from None
    try:
        return json_format.Parse(text, KernelRecord()), blob
    except json_format.ParseError as error:
        raise Corrupt(f"{record_path(path)} is no kernel record: {error}", hint="pull it again") from None
