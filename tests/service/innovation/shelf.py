"""The library's own tables on a database of the test's own, filled behind Urza's back."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path

import asyncpg

import esper_core.bus
import services.urza
from esper_core.blueprint.catalogue import catalogue
from esper_core.bus.database import Pool
from esper_core.config import Endpoints
from esper_core.kernel.manifest import KernelManifest, Provenance
from esper_core.kernel.record import KernelStatus
from esper_core.store.postgres import migrate, open_pool
from services.urza.blueprints import Blueprints
from tests.service.innovation.papers import interface

SCHEMAS = {
    "bus": Path(esper_core.bus.__path__[0]) / "schema",
    "urza": Path(services.urza.__path__[0]) / "schema",
}


@dataclass(frozen=True)
class Row:
    """A kernel as the tests invent it; figures and papers need not agree."""

    manifest: KernelManifest
    parameters: int = 1
    status: KernelStatus = KernelStatus.COMPILED
    tags: tuple[str, ...] = ()
    interface_id: str = "interface-a"
    blueprint_id: str = ""
    born_of: str = "catalogue"
    interest: float = float("-inf")
    forward: float | None = None
    """Median; the 99th percentile is twice that. None: not measured."""
    memory: int = 0
    target: str = "here"

    @property
    def kernel_id(self) -> str:
        return self.manifest.kernel_id

    def measurement(self) -> str | None:
        if self.forward is None:
            return None
        figures = {
            "batch": 8, "forward_seconds": self.forward, "forward_seconds_p99": 2 * self.forward, "backward_seconds": 1.0,
            "peak_memory_bytes": self.memory, "precision_drift": 0.0, "gradient_norm": 1.0, "deterministic": True,
            "repetitions": 3, "target": self.target,
        }  # fmt: skip
        return json.dumps(figures)


def manifests(count: int) -> list[KernelManifest]:
    """As many kernels, all different."""
    slot, ir = interface(), catalogue()["bottleneck_mlp"]
    made = [
        KernelManifest.describe(ir, slot, b"%d" % seed, Provenance(compiler="test"), seed=seed) for seed in range(count)
    ]
    return sorted(made, key=lambda manifest: manifest.kernel_id)


@contextlib.asynccontextmanager
async def scratch(stack: Endpoints) -> AsyncIterator[Pool]:
    """The library's tables, with nothing but the catalogue in them."""
    name = f"shelf_{secrets.token_hex(6)}"
    dsn = stack.postgres_dsn.get_secret_value()
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(f'CREATE DATABASE "{name}" STRATEGY = file_copy')
        own = dsn.replace("/esper?", f"/{name}?")
        await migrate(own, SCHEMAS)
        pool = await open_pool(own, size=8)
        try:
            await Blueprints(pool).seed()
            yield pool
        finally:
            await pool.close()
    finally:
        await connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        await connection.close()


async def put(pool: Pool, rows: Iterable[Row]) -> None:
    """Write ``rows`` as they are."""
    await pool.executemany(
        """INSERT INTO urza.kernels (kernel_id, blueprint_id, interface_id, manifest, blob_sha256, blob_bytes, parameters,
               status, tags, measurement, forward_seconds, created_by, born_of, interest)
           VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, 'test', $12, $13)""",
        [
            (
                row.kernel_id, row.blueprint_id or row.manifest.blueprint_id, row.interface_id,
                row.manifest.model_dump_json(), row.manifest.blob_sha256, row.manifest.blob_bytes, row.parameters,
                int(row.status), list(row.tags), row.measurement(), row.forward, row.born_of, row.interest,
            )
            for row in rows
        ],
    )  # fmt: skip
