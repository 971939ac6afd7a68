"""Experience: how grafts ended in the field, and the model of risk that is learnt from it. Knows PostgreSQL.

A report counts once, whichever judge hears of it; the newest model holds for all of them.
"""

from __future__ import annotations

import asyncio
import json

from esper_core import log
from esper_core.bus.database import Connection, Pool
from esper_core.bus.envelope import Event
from esper_core.errors import Unavailable
from esper_core.kernel.record import Measurement
from esper_core.lifecycle import State
from esper_core.pb.esper.core.v1 import decision_pb2
from services.bell import Bell
from services.urabrask import risk
from services.urabrask.risk import Model, Row

REPORTS = "urabrask-reports"
"""Rings when there is a new report."""
MODELS = "urabrask-tags"
"""Rings when kernels may need other tags: a new model, or a new kernel among those that tiers are cut from."""

LOG = log.get("urabrask")


class Experience:
    """What is learnt from the field."""

    def __init__(self, database: Pool, bell: Bell) -> None:
        self._database, self._bell = database, bell

    async def on_report(self, connection: Connection, event: Event) -> None:
        """Note how a graft ended, in the transaction that also notes the event's id."""
        report: decision_pb2.FieldReport = event.message
        await connection.execute(
            """INSERT INTO urabrask.reports (report_id, kernel_id, run_id, kept) VALUES ($1, $2, $3, $4)
               ON CONFLICT DO NOTHING""",
            report.report_id,
            report.kernel_id,
            report.run_id,
            State(report.outcome) is State.FOSSILIZED,
        )
        await self._bell.ring(connection, REPORTS)

    async def run(self) -> None:
        """Fit the model anew whenever ``risk.REFIT`` reports have come since, until the platform begins to stop."""
        try:
            while True:
                rung = self._bell.expect(REPORTS)
                await self.learn()
                await self._bell.wait(rung, timeout=60.0)
        except Unavailable:
            return

    async def learn(self) -> Model | None:
        """A new model, stored and told to every validated kernel; None while there is too little to learn from."""
        rows, kernels, failed = await self._reports()
        known = await self._database.fetchval("SELECT max(reports) FROM urabrask.risk_models") or 0
        if (len(failed) < known + risk.REFIT and known) or not risk.enough(kernels, failed):
            return None
        model = await asyncio.to_thread(risk.fit, rows, kernels, failed)
        async with self._database.acquire() as connection, connection.transaction():
            await connection.execute(
                """INSERT INTO urabrask.risk_models (version, reports, model) VALUES ($1, $2, $3)
                   ON CONFLICT DO NOTHING""",
                model.version,
                model.reports,
                model.model_dump_json(),
            )
            told = await _tell(connection, model)
            await self._bell.ring(connection, MODELS)
        LOG.info("risk.learnt", version=model.version, reports=model.reports, kernels=told)
        return model

    async def _reports(self) -> tuple[list[Row], list[str], list[bool]]:
        """Features, kernel and failure of every report about a kernel that was measured here."""
        found = await self._database.fetch(
            """SELECT r.kernel_id, r.kept, e.design, e.measurement
               FROM urabrask.reports r JOIN urabrask.evaluations e USING (kernel_id)
               WHERE e.design IS NOT NULL AND e.measurement IS NOT NULL ORDER BY r.serial"""
        )
        return (
            [_features(row["design"], row["measurement"]) for row in found],
            [row["kernel_id"] for row in found],
            [not row["kept"] for row in found],
        )


async def current(pool: Pool) -> Model | None:
    """The newest model; None while there is none."""
    found = await pool.fetchval("SELECT model FROM urabrask.risk_models ORDER BY serial DESC LIMIT 1")
    return None if found is None else Model.model_validate_json(found)


async def _tell(connection: Connection, model: Model) -> int:
    """Note every validated kernel's risk by ``model``; their number."""
    found = await connection.fetch(
        """SELECT kernel_id, design, measurement FROM urabrask.evaluations
           WHERE verdict = 2 AND design IS NOT NULL AND measurement IS NOT NULL ORDER BY kernel_id FOR UPDATE"""
    )
    risks = [(row["kernel_id"], model.risk(_features(row["design"], row["measurement"]))) for row in found]
    await connection.executemany(
        "UPDATE urabrask.evaluations SET risk = $2, risk_model = $3 WHERE kernel_id = $1",
        [(kernel_id, value, model.version) for kernel_id, value in risks],
    )
    return len(risks)


def _features(design: str, measurement: str) -> Row:
    return risk.features(json.loads(design), Measurement.model_validate_json(measurement))
