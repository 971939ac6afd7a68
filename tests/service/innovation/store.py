"""A library of the test's own with its bytes: rows on a database nobody else has, blobs in a bucket nobody else has."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import aioboto3
from pydantic import SecretStr

from esper_core.blueprint.catalogue import catalogue
from esper_core.bus.database import Connection, Pool
from esper_core.config import Endpoints
from esper_core.ids import sha256
from esper_core.kernel.manifest import KernelManifest, Provenance
from esper_core.kernel.record import KernelStatus
from esper_core.kernel.sign import generate_key, sign, statement
from esper_core.store.blobs import Blobs
from services.urza.copies import Copies
from services.urza.library import Library
from services.urza.retention import Progress, Retention
from tests.service.innovation import collector
from tests.service.innovation.papers import interface

SLOT = interface()
KEY = generate_key()


@dataclass
class Shelf:
    """A library of the test's own."""

    pool: Pool
    blobs: Blobs
    endpoints: Endpoints
    dsn: str
    library: Library

    @classmethod
    def on(cls, pool: Pool, blobs: Any, endpoints: Endpoints, dsn: str) -> Shelf:
        return cls(pool, blobs, endpoints, dsn, Library(pool, blobs, endpoints.keys_dir / "trust.json"))

    async def put(self, seed: int, blob: bytes) -> KernelManifest:
        """A kernel with these weights; kernels of different seeds may share them."""
        ir = catalogue()["bottleneck_mlp"]
        slot = SLOT.model_copy(update={"in_width": 100 + seed})
        manifest = KernelManifest.describe(ir, slot, blob, Provenance(compiler="test"))
        await self.library.put(manifest, sign(statement(manifest, "build", {}), KEY), blob, "tezzeret")
        return manifest

    async def set(self, manifest: KernelManifest, status: KernelStatus, reason: str = "") -> None:
        """Give it a status, behind everybody's back."""
        async with self.pool.acquire() as connection, connection.transaction():
            await connection.execute("ALTER TABLE urza.kernels DISABLE TRIGGER keep_kernel")
            update = "UPDATE urza.kernels SET status = $2, reason = $3, measurement = '{}' WHERE kernel_id = $1"
            await connection.execute(update, manifest.kernel_id, int(status), reason)
            await connection.execute("ALTER TABLE urza.kernels ENABLE TRIGGER keep_kernel")

    async def native(self, manifest: KernelManifest, blob: bytes) -> None:
        """A native part of it."""

        async def write(connection: Connection) -> None:
            await connection.execute(
                """INSERT INTO urza.natives (kernel_id, target, toolchain, record, blob_sha256, payload_type, payload, key_id,
                       signature, created_by) VALUES ($1, 'here', 'torch', '{}', $2, '', '', '', '', 'tezzeret')""",
                manifest.kernel_id,
                sha256(blob),
            )

        await Copies(self.pool).store(self.blobs, blob, write)

    async def collect(self, keep_unused: int = 0) -> Progress:
        return [progress async for progress in Retention(self.pool, self.blobs).collect(keep_unused)][-1]

    async def read(self, manifest: KernelManifest) -> bytes:
        return b"".join([part async for _, part in self.library.stream(manifest, 0)])

    async def ids(self) -> set[str]:
        return {row["kernel_id"] for row in await self.pool.fetch("SELECT kernel_id FROM urza.kernels")}

    async def killed(self, step: str, nth: int, how: str = "collect") -> None:
        """Have a process of its own collect and die at ``step`` for the ``nth`` time; ``how``: see ``collector.py``."""
        shown = {
            name: value.get_secret_value() if isinstance(value := getattr(self.endpoints, name), SecretStr) else value
            for name in Endpoints.model_fields
            if name != "upkeep"
        }
        died = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, collector.__file__, self.dsn, json.dumps(shown, default=str), step, str(nth), how],
            capture_output=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert died.returncode == -signal.SIGKILL, died.stderr.decode()[-2000:]

    async def keys(self) -> set[str]:
        """Names of what lies in the bucket, without their folders."""
        async with aioboto3.Session().client(
            "s3",
            endpoint_url=self.endpoints.s3_endpoint,
            aws_access_key_id=self.endpoints.s3_access_key,
            aws_secret_access_key=self.endpoints.s3_secret_key.get_secret_value(),
            region_name=self.endpoints.s3_region,
        ) as s3:
            listed = await s3.list_objects_v2(Bucket=self.endpoints.s3_bucket)
        return {item["Key"].rpartition("/")[2] for item in listed.get("Contents", ())}

    async def needed(self) -> set[str]:
        rows = await self.pool.fetch(
            """SELECT DISTINCT c.blob_sha256, c.number FROM urza.copies c
               JOIN (SELECT blob_sha256 FROM urza.kernels UNION SELECT blob_sha256 FROM urza.natives) n USING (blob_sha256)
               WHERE c.state = 1"""
        )
        return {row["blob_sha256"] + (f".{row['number']}" if row["number"] else "") for row in rows}
