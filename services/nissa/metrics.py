"""What Prometheus reads: counts of what was written in the journal since this process started, and gauges of how the
platform stands.

Labels are bounded: event types and lifecycle states are closed sets, issuers that are no principal of ours count as
``other``, and only the newest ``RUNS_SHOWN`` runs have figures of their own.
"""

from __future__ import annotations

import asyncio
import json
import platform as machine
from collections.abc import Sequence

import asyncpg
from prometheus_client import CollectorRegistry, Counter, Gauge, Info

from esper_core.bus.database import Pool
from esper_core.lifecycle import State
from services.nissa.journal import Entry, Journal

RUNS_SHOWN = 50
REFRESH_SECONDS = 2.0
ISSUERS = frozenset({"tamiyo", "kasmina", "operator"})
RUN_STATES = {1: "running", 2: "finished", 3: "failed", 4: "stopped"}


class Metrics:
    """The collectors, and the task that keeps them."""

    def __init__(self, registry: CollectorRegistry, database: Pool, journal: Journal, version: str) -> None:
        self._database = database
        self._journal = journal
        self._shown: dict[Gauge, set[str]] = {}
        self._ordinal: int | None = None
        self.events = Counter("esper_events", "Events written in the journal.", ["type"], registry=registry)
        self.epochs = Counter("esper_epochs", "Epochs completed, over all runs.", registry=registry)
        self.transitions = Counter("esper_seed_transitions", "State changes of seeds.", ["target"], registry=registry)
        self.orders = Counter("esper_orders", "Orders given to seeds.", ["issued_by", "target"], registry=registry)
        self.runs = Gauge("esper_runs", "Runs by state.", ["state"], registry=registry)
        self.loss = Gauge("esper_train_loss", "Training loss of a run's latest epoch.", ["run"], registry=registry)
        self.accuracy = Gauge(
            "esper_validation_accuracy", "Held-back accuracy of a run's latest epoch.", ["run"], registry=registry
        )
        self.pending = Gauge("esper_outbox_pending", "Recorded events not yet published.", registry=registry)
        self.lag = Gauge("esper_outbox_lag_seconds", "Age of the oldest unpublished event.", registry=registry)
        self.dead = Gauge("esper_dead_letters", "Messages that no consumer could take.", registry=registry)
        Info("esper_build", "What runs.", registry=registry).info(
            {"version": version, "python": machine.python_version()}
        )

    async def keep(self) -> None:
        """Keep everything up to date until cancelled.

        Raises:
            OSError, asyncpg.PostgresError: the database is away; call again.
        """
        if self._ordinal is None:
            self._ordinal = await self._journal.last_ordinal()
        while True:
            self._ordinal = await self.count(self._ordinal)
            await self.gauge()
            await asyncio.sleep(REFRESH_SECONDS)

    async def count(self, ordinal: int) -> int:
        """Count the events after ``ordinal``; returns the last one's."""
        while entries := await self._journal.after(ordinal):
            for entry in entries:
                self._count_one(entry)
            ordinal = entries[-1].ordinal
        return ordinal

    def _count_one(self, entry: Entry) -> None:
        kind = entry.type.rpartition(".")[2]
        self.events.labels(kind).inc()
        if kind == "EpochCompleted":
            self.epochs.inc()
        elif kind == "SeedEvent":
            self.transitions.labels(_state(json.loads(entry.payload)["target"])).inc()
        elif kind == "Command":
            order = json.loads(entry.payload)
            issuer = order["issued_by"] if order["issued_by"] in ISSUERS else "other"
            self.orders.labels(issuer, _state(order["target"])).inc()

    async def gauge(self) -> None:
        """Read how the platform stands."""
        rows = await self._database.fetch("SELECT state, count(*) AS runs FROM nissa.runs GROUP BY state")
        counts = {int(row["state"]): int(row["runs"]) for row in rows}
        for number, name in RUN_STATES.items():
            self.runs.labels(name).set(counts.get(number, 0))
        row = await self._database.fetchrow(
            """
            SELECT count(*) AS pending, coalesce(extract(epoch FROM now() - min(created)), 0) AS lag,
                   (SELECT count(*) FROM bus.dead_letters) AS dead
            FROM bus.outbox WHERE sent IS NULL
            """
        )
        if row is not None:
            self.pending.set(row["pending"])
            self.lag.set(float(row["lag"]))
            self.dead.set(row["dead"])
        self._show(
            await self._database.fetch(
                """
                SELECT r.run_id, h.metrics
                FROM (SELECT run_id FROM nissa.runs ORDER BY ordinal DESC LIMIT $1) r
                CROSS JOIN LATERAL (
                    SELECT metrics FROM nissa.history h WHERE h.run_id = r.run_id ORDER BY h.sequence DESC LIMIT 1) h
                """,
                RUNS_SHOWN,
            )
        )

    def _show(self, rows: Sequence[asyncpg.Record]) -> None:
        latest = {str(row["run_id"]): json.loads(row["metrics"]) for row in rows}
        losses = {run_id: figures.get("train_loss", 0.0) for run_id, figures in latest.items()}
        measured = {run_id: figures for run_id, figures in latest.items() if "validation_accuracy" in figures}
        accuracies = {run_id: figures["validation_accuracy"] for run_id, figures in measured.items()}
        for gauge, values in ((self.loss, losses), (self.accuracy, accuracies)):
            for run_id, value in values.items():
                gauge.labels(run_id).set(float(value))
            for run_id in self._shown.get(gauge, set()) - values.keys():
                gauge.remove(run_id)
            self._shown[gauge] = set(values)


def _state(name: str) -> str:
    """The lifecycle's name of a state as the wire spells it in JSON."""
    return State[name.removeprefix("SEED_STATE_")].name.lower()
