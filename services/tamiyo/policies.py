"""Policies: versioned by content, kept in the database, swapped between two decisions.

When the policy in force cannot be used (its kind or its parameters mean nothing to this build), the heuristic with its
defaults stands in and says so: ``conservative``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import asyncpg
from pydantic import ValidationError

from esper_core import log
from esper_core.blueprint.interface import canonical_json
from esper_core.bus.database import Pool
from esper_core.control.heuristic import HeuristicPolicy
from esper_core.control.packet import AdaptationSignal, SystemStatePacket
from esper_core.control.settings import HeuristicSettings
from esper_core.errors import InvalidInput, NotFound, nearest
from esper_core.ids import content_id

HEURISTIC = "heuristic"
KINDS = (HEURISTIC,)
_log = log.get("tamiyo")


@dataclass(frozen=True)
class Policy:
    """A stored policy; every parameter has a value."""

    version: str
    kind: str
    parameters: Mapping[str, float]


@dataclass(frozen=True)
class Force:
    """The policy in force, ready to decide.

    Attributes:
        stored: what the database says is in force.
        decider: what decides.
        conservative: whether ``decider`` is the stand-in instead.
    """

    stored: Policy
    decider: HeuristicPolicy
    conservative: bool = False

    def decide(self, packet: SystemStatePacket) -> AdaptationSignal:
        """The decider's answer, under the name of the policy in force."""
        signal = self.decider.decide(packet)
        told = {"policy_version": self.stored.version, "conservative": self.conservative}
        return signal.model_copy(update=told)


def describe(kind: str, parameters: Mapping[str, float]) -> Policy:
    """The policy of these parameters, defaults where unset.

    Raises:
        InvalidInput: an unknown kind or parameter, or a value out of range.
    """
    if kind not in KINDS:
        raise InvalidInput(f"there is no policy kind {kind!r}", hint=nearest(kind, KINDS))
    settings = _settings(parameters)
    complete = {name: float(value) for name, value in settings.model_dump().items()}
    version = content_id("policy", canonical_json({"kind": kind, "parameters": complete}))
    return Policy(version, kind, complete)


def _settings(parameters: Mapping[str, float]) -> HeuristicSettings:
    for name in parameters:
        if name not in HeuristicSettings.model_fields:
            raise InvalidInput(f"there is no parameter {name!r}", hint=nearest(name, HeuristicSettings.model_fields))
    try:
        return HeuristicSettings.model_validate(dict(parameters))
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        raise InvalidInput(f"parameter {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None


class Policies:
    """The shelf of policies, and the one in force."""

    def __init__(self, database: Pool) -> None:
        self._database = database
        self._force: Force | None = None

    @property
    def force(self) -> Force:
        """The policy in force; ``load`` has been called before."""
        if self._force is None:
            raise RuntimeError("no policy was loaded")
        return self._force

    async def load(self) -> Force:
        """Put the default heuristic in force when nothing is yet, and ``refresh``."""
        default = describe(HEURISTIC, {})
        await self.store(default)
        await self._database.execute(
            "INSERT INTO tamiyo.active (version) VALUES ($1) ON CONFLICT DO NOTHING", default.version
        )
        return await self.refresh()

    async def refresh(self) -> Force:
        """Read which policy is in force: another process may have changed it."""
        row = await self._database.fetchrow("SELECT p.* FROM tamiyo.active JOIN tamiyo.policies p USING (version)")
        if row is None:
            raise RuntimeError("tamiyo.active is empty: load() puts a version there")
        if self._force is None or self._force.stored.version != row["version"]:
            self._force = _force(row)
        return self._force

    async def store(self, policy: Policy) -> None:
        """Keep a policy; does not put it in force."""
        await self._database.execute(
            "INSERT INTO tamiyo.policies (version, kind, parameters) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
            policy.version,
            policy.kind,
            json.dumps(policy.parameters),
        )

    async def activate(self, version: str) -> Force:
        """Put a stored version in force, for this process at once and for others when they look.

        Raises:
            NotFound: no such version is stored.
        """
        row = await self._database.fetchrow("SELECT * FROM tamiyo.policies WHERE version = $1", version)
        if row is None:
            rows = await self._database.fetch("SELECT version FROM tamiyo.policies ORDER BY created DESC LIMIT 50")
            known = [str(other["version"]) for other in rows]
            raise NotFound(f"there is no policy {version!r}", hint=nearest(version, known))
        await self._database.execute(
            """
            INSERT INTO tamiyo.active (version) VALUES ($1)
            ON CONFLICT (single) DO UPDATE SET version = excluded.version
            """,
            version,
        )
        self._force = _force(row)
        return self._force


def _force(row: Mapping[str, Any] | asyncpg.Record) -> Force:
    stored = Policy(row["version"], row["kind"], json.loads(row["parameters"]))
    try:
        described = describe(stored.kind, stored.parameters)
        return Force(stored, HeuristicPolicy(_settings(described.parameters)))
    except InvalidInput as error:
        _log.error("policy.unusable", version=stored.version, kind=stored.kind, error=error.message)
        return Force(stored, HeuristicPolicy(), conservative=True)
