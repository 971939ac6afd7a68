"""Rows of the library as domain nouns, and back. Knows the schema's columns, how statements are kept."""

from __future__ import annotations

import json

import asyncpg

from esper_core.bus.database import Connection
from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.record import KernelRecord, KernelStatus, Measurement
from esper_core.kernel.sign import Attestation, Role

KERNEL = """
SELECT k.kernel_id, k.manifest, k.status, k.reason, k.tags, k.measurement, k.interface_id, k.parameters,
    k.speed, k.interest, k.serial, k.revision, k.born_of,
    u.streams, u.fossilized, u.culled, u.rolled_back, u.measured, u.contribution,
    (SELECT last_value FROM urza.deeds) AS deeds,
    (SELECT coalesce(jsonb_agg(jsonb_build_object(
            'payload_type', a.payload_type, 'payload', translate(encode(a.payload, 'base64'), E'\\n', ''),
            'key_id', a.key_id, 'signature', translate(encode(a.signature, 'base64'), E'\\n', ''))
        ORDER BY a.role), '[]')
     FROM urza.attestations a WHERE a.kernel_id = k.kernel_id) AS attestations
FROM urza.kernels k LEFT JOIN urza.usage u ON u.kernel_id = k.kernel_id
"""
"""Selects kernels with what became of them in the field and with their attestations, the build's first (roles sort so)."""


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
        born_of=row["born_of"],
    )


async def attest(connection: Connection, kernel_id: str, role: Role, attestation: Attestation) -> None:
    """Keep a statement about a kernel, instead of an earlier one in the same role."""
    await connection.execute(
        """INSERT INTO urza.attestations (kernel_id, role, payload_type, payload, key_id, signature)
           VALUES ($1, $2, $3, $4, $5, $6)
           ON CONFLICT (kernel_id, role) DO UPDATE SET payload_type = excluded.payload_type,
               payload = excluded.payload, key_id = excluded.key_id, signature = excluded.signature, created = now()""",
        kernel_id,
        role,
        attestation.payload_type,
        attestation.payload,
        attestation.key_id,
        attestation.signature,
    )
