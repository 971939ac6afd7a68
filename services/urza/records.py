"""Rows of the library as domain nouns, and back. Knows the schema's columns, nothing of connections."""

from __future__ import annotations

import json
from collections.abc import Iterable

import asyncpg

from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.record import KernelRecord, KernelStatus, Measurement
from esper_core.kernel.sign import Attestation

KERNEL = """
SELECT k.kernel_id, k.manifest, k.status, k.reason, k.tags, k.measurement, k.interface_id, k.parameters,
    (SELECT coalesce(jsonb_agg(jsonb_build_object(
            'payload_type', a.payload_type, 'payload', translate(encode(a.payload, 'base64'), E'\\n', ''),
            'key_id', a.key_id, 'signature', translate(encode(a.signature, 'base64'), E'\\n', ''))
        ORDER BY a.role), '[]')
     FROM urza.attestations a WHERE a.kernel_id = k.kernel_id) AS attestations
FROM urza.kernels k
"""
"""Selects kernels with their attestations, the build's first (roles sort so)."""


def kernel(row: asyncpg.Record) -> KernelRecord:
    """The record in a row of ``KERNEL``."""
    measurement = row["measurement"]
    return KernelRecord(
        manifest=KernelManifest.model_validate_json(row["manifest"]),
        status=KernelStatus(row["status"]),
        reason=row["reason"],
        tags=tuple(row["tags"]),
        measurement=None if measurement is None else Measurement.model_validate_json(measurement),
        attestations=tuple(Attestation.model_validate(fields) for fields in json.loads(row["attestations"])),
        interface_id=row["interface_id"],
    )


def kernels(rows: Iterable[asyncpg.Record]) -> list[KernelRecord]:
    """The records in rows of ``KERNEL``."""
    return [kernel(row) for row in rows]
