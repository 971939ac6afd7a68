"""What a controller sees of a run and what it answers: the domain twins of ``esper.core.v1``.

Frozen and free of tensors, so that a packet can be stored, replayed, sent and compared. Field names equal the wire's.
"""

from __future__ import annotations

import enum

from pydantic import BaseModel, ConfigDict, Field

from esper_core.blueprint.interface import SlotInterface
from esper_core.lifecycle import State


class Noun(BaseModel):
    """A frozen value; unknown fields are refused, numbers must be finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RampStyle(enum.IntEnum):
    """The shape of alpha's way from 0 to 1."""

    UNSPECIFIED = 0
    """The run's default."""
    LINEAR = 1
    """Equal steps."""
    COSINE = 2
    """Slow at both ends."""
    SIGMOID = 3
    """Slower still at both ends."""


class ReasonCode(enum.IntEnum):
    """Why a controller did or did not act."""

    UNHEALTHY = 1
    """Health under its threshold: the slot asks for growth."""
    CONFIDENT = 2
    """Confidence over its threshold."""
    BEST_PLACE = 3
    """It offers the most gain per added parameter."""
    KERNEL_FITS_SPECTRUM = 4
    """The kernel covers the wanted share of the gain at the least cost."""
    HEALTHY = 5
    """No slot is unhealthy: leave the network alone."""
    NOT_CONFIDENT = 6
    """Unhealthy, but the evidence is weak or was seen only once."""
    GRAFT_IN_FLIGHT = 7
    """Another graft is in flight; credit would be unclear."""
    EMBARGOED = 8
    """The slot is embargoed."""
    NO_KERNEL = 9
    """No validated kernel fits the interface and the budget."""
    NO_BUDGET = 10
    """The budget or the per-epoch cap is used up."""
    NOT_MEASURED = 11
    """The slot was not measured."""
    TURN = 12
    """All signals are mute; slots take turns."""
    CONSERVATIVE = 13
    """The policy failed and the heuristic stood in."""
    DEAD = 14
    """Not one unit of the spanned layer ever fires: it cannot recover by itself."""
    ON_ITS_WAY = 15
    """At its present pace the run will have solved its task before a graft could be judged."""


class GrowthSignal(Noun):
    """What the residual gradient says about a slot; see ``esper_core.nn.signals``."""

    gain: float = Field(ge=0)
    gain_relative: float = Field(ge=0)
    share: float = Field(ge=0, le=1)
    score: float = Field(ge=0)
    gain_of_loss: float = Field(ge=0)
    spectrum: tuple[float, ...] = ()
    confidence: float = Field(ge=0, le=1)
    samples: int = Field(ge=0)
    unit_parameters: int = Field(ge=0)
    null_gain: float = Field(default=0.0, ge=0)


class HealthSignal(Noun):
    """A slot's vital signs at an epoch's end; ``None`` = not measured."""

    slot: str
    epoch: int = Field(default=0, ge=0)
    health: float | None = Field(default=None, ge=0, le=1)
    activation_variance: float | None = None
    dead_unit_ratio: float | None = None
    mean_correlation: float | None = None
    weight_norm: float | None = None
    gradient_norm: float | None = None
    effective_rank: float | None = None
    latency_seconds: float | None = None
    error_count: int = 0
    age: int = 0
    ready: bool = False
    signal: GrowthSignal | None = None


def lasting_parameters(units: int, parameters: int, unit_parameters: int) -> int:
    """What a kernel of ``parameters`` adds to the host in the end: a widening leaves its units, whatever it was made of."""
    return units * unit_parameters if units and unit_parameters else parameters


class KernelCandidate(Noun):
    """A kernel that could be put into a slot."""

    kernel_id: str
    blueprint_id: str = ""
    blueprint_name: str = ""
    width: int = Field(default=0, ge=0)
    parameters: int = Field(default=0, ge=0)
    flops: int = Field(default=0, ge=0)
    foldable: bool = False
    forward_seconds: float = Field(default=0.0, ge=0)
    learned: float | None = Field(default=None, le=1)
    born_of: str = ""

    def cost(self, unit_parameters: int) -> int:
        """Parameters that the host will have more of in the end."""
        return lasting_parameters(self.width if self.foldable else 0, self.parameters, unit_parameters)


class SlotState(Noun):
    """One slot in a state packet."""

    slot: str
    interface: SlotInterface
    state: State
    generation: int = 0
    embargo_until_epoch: int = 0
    barred_blueprint_ids: tuple[str, ...] = ()
    health: HealthSignal
    evidence: tuple[GrowthSignal, ...] = ()
    candidates: tuple[KernelCandidate, ...] = ()


class HostEdge(Noun):
    """Data flow between two host modules, as indices into ``SystemStatePacket.host_modules``."""

    source: int = 0
    target: int = 0


class Budget(Noun):
    """What growth may still cost; ``parameters=None`` = no limit."""

    parameters: int | None = Field(default=None, ge=0)
    adaptations: int = Field(default=2, ge=0)


class SystemStatePacket(Noun):
    """Everything a controller sees of a run at an epoch's end."""

    run_id: str
    epoch: int = Field(default=0, ge=0)
    train_loss: float = 0.0
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    loss_window: tuple[float, ...] = ()
    slots: tuple[SlotState, ...] = ()
    budget: Budget = Budget()
    host_modules: tuple[str, ...] = ()
    host_edges: tuple[HostEdge, ...] = ()
    host_parameters: int = 0
    first_loss: float | None = None


class Reason(Noun):
    """One reason, with the figure behind it."""

    code: ReasonCode
    detail: str = ""
    value: float | None = None
    threshold: float | None = None


class Command(Noun):
    """An order to a run about one of its slots, applied once at its next epoch boundary."""

    command_id: str
    run_id: str
    slot: str
    target: State
    kernel_id: str = ""
    issued_by: str
    reason: str = ""
    style: RampStyle = RampStyle.UNSPECIFIED


class AdaptationAction(Noun):
    """One thing to do, and why."""

    command: Command
    confidence: float = Field(default=0.0, ge=0, le=1)
    expected_gain: float = Field(default=0.0, ge=0)
    reasons: tuple[Reason, ...]


class AdaptationSignal(Noun):
    """A controller's answer to a state packet."""

    decision_id: str
    run_id: str
    epoch: int = 0
    policy_version: str
    actions: tuple[AdaptationAction, ...] = ()
    abstentions: tuple[Reason, ...] = ()
    conservative: bool = False
    seconds: float = 0.0


class SeedEvent(Noun):
    """A state change, with its reason and what was measured for it."""

    seed_id: str
    run_id: str
    slot: str
    generation: int = 0
    source: State
    target: State
    epoch: int = 0
    reason: str = ""
    command_id: str = ""
    kernel_id: str = ""
    blueprint_name: str = ""
    alpha: float = Field(default=0.0, ge=0, le=1)
    measurements: dict[str, float] = {}
    execution: str = ""


class FieldReport(Noun):
    """What came of a graft, told to those who learn from it."""

    report_id: str
    run_id: str
    seed_id: str
    slot: str
    kernel_id: str
    blueprint_id: str = ""
    command_id: str = ""
    outcome: State
    germinated_epoch: int = 0
    finished_epoch: int = 0
    contribution: float | None = None
    contribution_lower: float | None = None
    rent: float | None = None
    parameters: int = 0
    reconstruction: float | None = None
    reason: str = ""
    folded: bool = False
