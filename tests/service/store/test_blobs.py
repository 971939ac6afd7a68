"""Bytes come back as they were put, or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from esper_core.config import Endpoints
from esper_core.errors import Corrupt, InvalidInput, NotFound, Unavailable
from esper_core.store import blobs as blobs_module
from esper_core.store.blobs import Blobs

DATA = bytes(range(256)) * 40
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(scope="module")
async def bucket(stack: Endpoints) -> Endpoints:
    """The endpoints with a bucket for this module in them."""
    return stack.model_copy(update={"s3_bucket": f"blobs-{secrets.token_hex(6)}"})


@pytest.fixture(scope="module")
async def opened(bucket: Endpoints) -> AsyncIterator[Blobs]:
    async with await Blobs.open(bucket) as blobs:
        yield blobs


@pytest.fixture
async def blobs(opened: Blobs) -> Blobs:
    """An open bucket without the bytes these tests put."""
    await opened.delete(DIGEST)
    return opened


def on_disk(bucket: Endpoints, digest: str) -> Path:
    """The file in which the laptop's S3 server keeps a blob."""
    return next((bucket.data_dir / "s3" / bucket.s3_bucket).rglob(digest))


async def test_what_is_put_is_got(blobs: Blobs) -> None:
    assert not await blobs.exists(DIGEST)
    assert await blobs.put(DATA) == DIGEST
    assert await blobs.put(DATA) == DIGEST
    assert await blobs.exists(DIGEST)
    assert await blobs.get(DIGEST) == DATA
    assert await blobs.put(b"") == hashlib.sha256(b"").hexdigest()
    assert await blobs.get(hashlib.sha256(b"").hexdigest()) == b""


async def test_ranges(blobs: Blobs) -> None:
    await blobs.put(DATA)
    for offset, size in [(0, 1), (0, len(DATA)), (5, 100), (len(DATA) - 3, 100), (len(DATA), 5), (len(DATA) + 9, 5)]:
        assert await blobs.read(DIGEST, offset, size) == DATA[offset : offset + size]
    for offset, size in [(-1, 5), (0, 0)]:
        with pytest.raises(InvalidInput):
            await blobs.read(DIGEST, offset, size)


async def test_what_is_not_there_says_so(blobs: Blobs) -> None:
    missing = "0" * 64
    with pytest.raises(NotFound):
        await blobs.get(missing)
    with pytest.raises(NotFound):
        await blobs.read(missing, 0, 1)
    assert not await blobs.exists(missing)
    await blobs.delete(missing)
    await blobs.put(DATA)
    await blobs.delete(DIGEST)
    assert not await blobs.exists(DIGEST)


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "0" * 63, "A" * 64, "0" * 64 + "/x"])
async def test_only_digests_are_names(blobs: Blobs, name: str) -> None:
    with pytest.raises(InvalidInput):
        await blobs.get(name)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
async def test_damaged_bytes_are_never_returned_and_putting_again_mends_them(
    blobs: Blobs, bucket: Endpoints, damage: str
) -> None:
    await blobs.put(DATA)
    path = on_disk(bucket, DIGEST)
    flipped = bytearray(DATA)
    flipped[1234] ^= 4
    path.write_bytes({"flipped": bytes(flipped), "cut": DATA[:-1], "empty": b""}[damage])
    with pytest.raises(Corrupt, match=DIGEST):
        await blobs.get(DIGEST)
    await blobs.put(DATA)
    assert await blobs.get(DIGEST) == DATA


async def test_bytes_appended_in_the_store_are_never_returned(blobs: Blobs, bucket: Endpoints) -> None:
    """While the server remembers the old length it gives the right bytes; afterwards it is told as damage."""
    await blobs.put(DATA)
    on_disk(bucket, DIGEST).write_bytes(DATA + b"x")
    with contextlib.suppress(Corrupt):
        assert await blobs.get(DIGEST) == DATA
    await blobs.put(DATA)
    assert await blobs.get(DIGEST) == DATA


async def test_the_same_blob_from_many_at_once(blobs: Blobs) -> None:
    assert await asyncio.gather(*(blobs.put(DATA) for _ in range(6))) == [DIGEST] * 6
    assert await blobs.get(DIGEST) == DATA


async def test_the_bucket_is_made_at_need(stack: Endpoints) -> None:
    endpoints = stack.model_copy(update={"s3_bucket": "made-at-need"})
    for _ in range(2):
        async with await Blobs.open(endpoints) as blobs:
            await blobs.put(b"x")


async def test_an_absent_or_refusing_store_says_so(stack: Endpoints) -> None:
    from pydantic import SecretStr

    with pytest.raises(Unavailable, match="is away") as caught:
        await Blobs.open(stack.model_copy(update={"s3_endpoint": "http://127.0.0.1:1"}))
    assert "esperctl" in caught.value.hint
    with pytest.raises(InvalidInput, match="refuses"):
        await Blobs.open(stack.model_copy(update={"s3_secret_key": SecretStr("wrong")}))


async def test_giants_are_refused(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs_module, "MAX_BLOB", 10)
    with pytest.raises(InvalidInput, match="larger than 10"):
        await blobs.put(b"x" * 11)
