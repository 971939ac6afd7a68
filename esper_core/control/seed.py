"""A seed: one try at one slot, from dormancy to its end. Holds what is known of it; every change goes through the lifecycle table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from esper_core.control.packet import RampStyle, SeedEvent
from esper_core.lifecycle import State, check
from esper_core.nn.native import Passes

MUTABLE = (
    "generation", "since", "kernel_id", "blueprint_id", "blueprint_name", "command_id", "parameters", "germinated_epoch",
    "reconstruction", "contribution", "contribution_lower", "rent", "lessons", "folded", "fold_difference", "band", "failures",
    "native", "eager",
)  # fmt: skip
"""Plain fields that a checkpoint carries over as they are."""


@dataclass
class Seed:
    """Attributes are those of ``esper.core.v1.Seed`` and what its reports need; ``since`` is the epoch of its last change,
    ``failures`` the tries at the slot that failed in a row, this one included, ``native`` whether its kernel has compiled code,
    ``eager`` why not where the run trusts such, ``passes`` how often that ran."""

    run_id: str
    slot: str
    generation: int = 0
    state: State = State.DORMANT
    since: int = 0
    kernel_id: str = ""
    blueprint_id: str = ""
    blueprint_name: str = ""
    command_id: str = ""
    style: RampStyle = RampStyle.UNSPECIFIED
    parameters: int = 0
    germinated_epoch: int = 0
    reconstruction: float | None = None
    contribution: float | None = None
    contribution_lower: float | None = None
    rent: float | None = None
    lessons: int = 0
    folded: bool = False
    fold_difference: float | None = None
    band: float = math.inf
    failures: int = 0
    native: bool = False
    eager: str = ""
    passes: Passes = field(default_factory=Passes)
    embargo_until: int = 0
    barred: set[str] = field(default_factory=set)

    @property
    def seed_id(self) -> str:
        return f"{self.run_id}/{self.slot}/{self.generation}"

    @property
    def execution(self) -> str:
        """How its kernel has run so far, in words; empty where the run trusts no compiled code."""
        if self.eager:
            return f"eager: {self.eager}"[:300]
        if not self.native:
            return ""
        return f"native, but for {self.passes.why}"[:300] if self.passes.eager else "native"

    def advance(
        self,
        target: State,
        epoch: int,
        reason: str,
        *,
        facts: Mapping[str, bool] | None = None,
        measurements: Mapping[str, float] | None = None,
        alpha: float = 0.0,
        command_id: str = "",
    ) -> SeedEvent:
        """Move to ``target`` when the table has the edge and every guard is a measured truth.

        Raises:
            IllegalTransition: otherwise, and nothing has changed.
        """
        check(self.state, target, facts)
        event = SeedEvent(
            seed_id=self.seed_id,
            run_id=self.run_id,
            slot=self.slot,
            generation=self.generation,
            source=self.state,
            target=target,
            epoch=epoch,
            reason=reason[:500],
            command_id=command_id,
            kernel_id=self.kernel_id,
            blueprint_name=self.blueprint_name,
            alpha=alpha,
            measurements={**(measurements or {}), **self._counted()},
            execution=self.execution,
        )
        self.state, self.since = target, epoch
        return event

    def _counted(self) -> dict[str, float]:
        if not (self.native or self.passes.native):
            return {}
        return {
            "native_passes": self.passes.native,
            "native_gradients": self.passes.gradients,
            "eager_passes": self.passes.eager,
        }

    def reborn(self) -> Seed:
        """The slot's next seed: dormant, remembering which blueprints are barred and how many tries have failed in a row."""
        failures = 0 if self.state is State.FOSSILIZED else self.failures
        barred = set(self.barred)
        return Seed(self.run_id, self.slot, self.generation + 1, since=self.since, failures=failures, barred=barred)

    def state_dict(self) -> dict[str, object]:
        """What resuming needs, as plain values."""
        plain = {name: getattr(self, name) for name in MUTABLE}
        return plain | {
            "state": int(self.state),
            "style": int(self.style),
            "embargo_until": self.embargo_until,
            "barred": sorted(self.barred),
            "passes": asdict(self.passes),
        }

    @classmethod
    def from_state_dict(cls, run_id: str, slot: str, state: Mapping[str, Any]) -> Seed:
        """The seed that ``state_dict`` described."""
        values = dict(state)
        values["state"], values["style"] = State(values["state"]), RampStyle(values["style"])
        passes = Passes(**values.pop("passes", {}))
        return cls(run_id, slot, barred=set(values.pop("barred")), passes=passes, **values)
