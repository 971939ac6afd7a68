"""A library from before searches, usage and collections keeps its kernels, and can be searched and collected like a new one."""

from __future__ import annotations

import secrets
import shutil
from dataclasses import replace
from pathlib import Path

import asyncpg

from esper_core.blueprint.catalogue import catalogue
from esper_core.config import Endpoints
from esper_core.kernel.record import KernelStatus
from esper_core.store.blobs import Blobs
from esper_core.store.postgres import migrate, open_pool
from services.urza.blueprints import Blueprints
from services.urza.library import Library
from services.urza.query import Order, Query
from services.urza.retention import Retention
from tests.service.innovation.shelf import SCHEMAS, Row, manifests

OLD = """
INSERT INTO urza.kernels (kernel_id, blueprint_id, interface_id, manifest, blob_sha256, blob_bytes, parameters, status, tags,
    measurement, forward_seconds, created_by) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, 'tezzeret')
"""


async def test_rows_of_the_first_schema_are_taken_along(stack: Endpoints, bucket: Endpoints, tmp_path: Path) -> None:
    shutil.copy(SCHEMAS["urza"] / "0001_library.sql", tmp_path)
    fast, slow, bad = (
        Row(manifest, forward=forward, memory=memory, status=status, tags=("a",))
        for manifest, forward, memory, status in zip(
            manifests(3),
            (1e-4, 2e-4, 3e-4),
            (300, 200, 100),
            (KernelStatus.VALIDATED, KernelStatus.VALIDATED, KernelStatus.REJECTED),
            strict=True,
        )
    )
    name = f"upgrade_{secrets.token_hex(6)}"
    dsn = stack.postgres_dsn.get_secret_value()
    admin = await asyncpg.connect(dsn)
    try:
        await admin.execute(f'CREATE DATABASE "{name}" STRATEGY = file_copy')
        own = dsn.replace("/esper?", f"/{name}?")
        await migrate(own, {"urza": tmp_path})
        pool = await open_pool(own, size=2)
        ir = catalogue()["bottleneck_mlp"]
        await Blueprints(pool).put(ir, "karn")
        async with await Blobs.open(bucket) as blobs:
            for row, blob in zip((fast, slow, bad), (b"one", b"two", b"two"), strict=True):
                digest = await blobs.put(blob)
                await pool.execute(
                    OLD, row.kernel_id, row.manifest.blueprint_id, "interface-a", row.manifest.model_dump_json(), digest,
                    len(blob), row.parameters, int(row.status), list(row.tags), row.measurement(), row.forward,
                )  # fmt: skip
            ran = await migrate(own, SCHEMAS)
            assert "0002_search.sql" in [migration.name for migration in ran]

            library = Library(pool, blobs, tmp_path)
            query = Query(born_of="karn", target="here", order=Order.FORWARD)
            found, _ = await library.query(query)
            assert [one.record.manifest.kernel_id for one in found] == [fast.kernel_id, slow.kernel_id, bad.kernel_id]
            small, _ = await library.query(replace(query, max_memory_bytes=200, status=2))
            assert [one.record.manifest.kernel_id for one in small] == [slow.kernel_id]
            *_, done = [progress async for progress in Retention(pool, blobs).collect(keep_unused=10)]
            assert (done.rejected, done.unused, done.blobs, done.kept) == (1, 0, 0, 2)  # the bytes are shared
            digest = await pool.fetchval("SELECT blob_sha256 FROM urza.kernels WHERE kernel_id = $1", slow.kernel_id)
            assert await blobs.get(digest) == b"two"
        await pool.close()
    finally:
        await admin.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        await admin.close()
