"""Content-addressed bytes on S3: named by their SHA-256, verified on every read.

A blob may have several copies, each with a number: a copy that is being deleted is not the one that is being written.
The store is trusted with nothing: not to keep what it was given, not to honour conditions. What is read whole is
hashed; a range read cannot be and is for readers that hash the whole by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from types import TracebackType
from typing import Any, Self

import aiohttp
from aioboto3.session import Session
from aiobotocore.config import AioConfig
from botocore.exceptions import BotoCoreError, ClientError

from esper_core import log
from esper_core.config import Endpoints
from esper_core.errors import Corrupt, EsperError, InvalidInput, NotFound, Unavailable
from esper_core.ids import sha256

MAX_BLOB = 512 * 1024 * 1024  # bytes
ATTEMPTS = 3  # for one request
LOOKS = 0.0, 0.05, 0.2, 0.5, 1.0  # seconds before each look at what was stored

_DIGEST = re.compile(r"^[0-9a-f]{64}$")
_MISSING = {"404", "NoSuchKey", "NotFound"}
_log = log.get("store")


class Blobs:
    """An open bucket. Made by ``open``; closed by ``close`` or as a context manager."""

    def __init__(self, s3: Any, bucket: str, endpoint: str, stack: contextlib.AsyncExitStack) -> None:
        self._s3 = s3
        self._bucket = bucket
        self._endpoint = endpoint
        self._stack = stack

    @classmethod
    async def open(cls, endpoints: Endpoints) -> Self:
        """Connect to the bucket that ``endpoints`` names, making it when it is not there.

        Raises:
            Unavailable: the store does not answer.
            InvalidInput: it refuses the credentials or the bucket.
        """
        stack = contextlib.AsyncExitStack()
        client = Session().client(  # type: ignore[no-untyped-call]
            "s3",
            endpoint_url=endpoints.s3_endpoint,
            region_name=endpoints.s3_region,
            aws_access_key_id=endpoints.s3_access_key,
            aws_secret_access_key=endpoints.s3_secret_key.get_secret_value(),
            config=AioConfig(  # type: ignore[no-untyped-call]
                connect_timeout=3,
                read_timeout=30,
                retries={"mode": "standard", "max_attempts": ATTEMPTS},
                s3={"addressing_style": "path"},
                signature_version="s3v4",
            ),
        )
        blobs = cls(await stack.enter_async_context(client), endpoints.s3_bucket, endpoints.s3_endpoint, stack)
        try:
            await blobs._make_bucket()
        except BaseException:
            await blobs.close()
            raise
        return blobs

    async def put(self, data: bytes, copy: int = 0) -> str:
        """Store ``data`` and return its name; bytes that are there already are not sent again.

        Raises:
            InvalidInput: larger than 512 MiB.
            Unavailable: the store is away, or did not keep what it was given.
        """
        if len(data) > MAX_BLOB:
            raise InvalidInput(f"a blob of {len(data)} bytes is larger than {MAX_BLOB}")
        digest = sha256(data)
        if await self._size(digest, copy) == len(data):
            with contextlib.suppress(Corrupt, NotFound):
                await self.get(digest, copy)
                return digest
            _log.error("store.blob_replaced", sha256=digest, bytes=len(data))
        try:
            await self._s3.put_object(Bucket=self._bucket, Key=_key(digest, copy), Body=data)
        except (BotoCoreError, ClientError) as error:
            raise self._translated(error, digest) from error
        if not await self._keeps(digest, copy, len(data)):
            raise Unavailable(f"the blob store did not keep {digest}", hint="its disk may be full")
        return digest

    async def _keeps(self, digest: str, copy: int, size: int) -> bool:
        """Whether a blob has its size; asked again for a while, since somebody else may be storing the same bytes just now."""
        for seconds in LOOKS:
            await asyncio.sleep(seconds)
            if await self._size(digest, copy) == size:
                return True
        return False

    async def get(self, digest: str, copy: int = 0) -> bytes:
        """The bytes named ``digest``.

        Raises:
            NotFound: no such blob.
            Corrupt: the store returned other bytes.
            Unavailable: the store is away.
        """
        data = await self._read(digest, copy)
        if sha256(data) != digest:
            _log.error("store.blob_corrupt", sha256=digest, bytes=len(data))
            raise Corrupt(
                f"blob {digest} is damaged in the store", hint="store it again: that replaces the damaged bytes"
            )
        return data

    async def read(self, digest: str, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``, fewer at the end, none past it; not verified: the reader hashes the whole.

        Raises:
            NotFound, Unavailable: as ``get``.
            InvalidInput: a negative offset or a size below 1.
        """
        if offset < 0 or size < 1:
            raise InvalidInput(f"cannot read {size} bytes from offset {offset}")
        total = await self._size(digest)
        if total is None:
            raise NotFound(f"no blob {digest}")
        if offset >= total:
            return b""
        return await self._read(digest, span=f"bytes={offset}-{min(offset + size, total) - 1}")

    async def exists(self, digest: str, copy: int = 0) -> bool:
        """Whether a blob of that name is there; says nothing about its bytes."""
        return await self._size(digest, copy) is not None

    async def delete(self, digest: str, copy: int = 0) -> None:
        """Remove a blob; one that is not there is no error."""
        try:
            await self._s3.delete_object(Bucket=self._bucket, Key=_key(digest, copy))
        except (BotoCoreError, ClientError) as error:
            if not isinstance(translated := self._translated(error, digest), NotFound):
                raise translated from error

    async def close(self) -> None:
        """Let go of the connections; safe to repeat."""
        await self._stack.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _make_bucket(self) -> None:
        try:
            try:
                await self._s3.head_bucket(Bucket=self._bucket)
            except ClientError as error:
                if _code(error) not in _MISSING | {"NoSuchBucket"}:
                    raise
                await self._s3.create_bucket(Bucket=self._bucket)
        except (BotoCoreError, ClientError) as error:
            raise self._translated(error, f"bucket {self._bucket}") from error

    async def _size(self, digest: str, copy: int = 0) -> int | None:
        try:
            head = await self._s3.head_object(Bucket=self._bucket, Key=_key(digest, copy))
        except (BotoCoreError, ClientError) as error:
            if isinstance(translated := self._translated(error, digest), NotFound):
                return None
            raise translated from error
        return int(head["ContentLength"])

    async def _read(self, digest: str, copy: int = 0, span: str | None = None) -> bytes:
        extra = {"Range": span} if span else {}
        for _ in range(ATTEMPTS):
            try:
                answer = await self._s3.get_object(Bucket=self._bucket, Key=_key(digest, copy), **extra)
                async with answer["Body"] as body:
                    return bytes(await body.read())
            except (BotoCoreError, ClientError) as error:
                raise self._translated(error, digest) from error
            except (aiohttp.ClientError, OSError):
                # The transfer broke off: because the store went away, which this tells, or because the bytes are not
                # there, which is so when it breaks off every time.
                await self._size(digest, copy)
        raise Corrupt(f"the blob store breaks off {digest} every time", hint="store it again: that replaces the bytes")

    def _translated(self, error: BotoCoreError | ClientError, what: str) -> EsperError:
        if isinstance(error, ClientError):
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            if _code(error) in _MISSING:
                return NotFound(f"no blob {what}")
            if 400 <= status < 500 and status not in (408, 429):
                return InvalidInput(
                    f"the blob store at {self._endpoint} refuses {what}: {_code(error)}",
                    hint="check bucket, access key and secret key",
                )
        return Unavailable(
            f"the blob store at {self._endpoint} is away: {type(error).__name__}",
            hint="`esperctl status` says what runs; `esperctl up` starts it",
        )


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _key(digest: str, copy: int = 0) -> str:
    if not _DIGEST.match(digest):
        raise InvalidInput(f"{digest!r} names no blob", hint="a blob's name is the hex SHA-256 of its bytes")
    return f"sha256/{digest[:2]}/{digest}" + (f".{copy}" if copy else "")
