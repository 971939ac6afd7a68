"""Every constant of carving, in one place, with its default. Times are epochs."""

from __future__ import annotations

from pydantic import Field

from esper_core.control.settings import Settings


class CarveSettings(Settings):
    """Whether, when and how much may be carved."""

    enabled: bool = Field(default=False)
    """Measure and carve at all."""
    autonomous: bool = Field(default=True)
    """Follow the rules without being asked; otherwise units are only measured, and carved when somebody orders it."""
    warmup_epochs: int = Field(default=10, ge=0)
    """Epochs before the first measurement: early on, hardly a unit is worth anything yet."""
    measure_every: int = Field(default=5, ge=1)
    """Epochs between measurements, and so between plans."""
    observe_epochs: int = Field(default=3, ge=1)
    """Epochs that units stay silenced before they are taken out."""
    loss_share: float = Field(default=0.25, ge=0)
    """What a plan may cost at first, as a share of the held-back loss, by the estimate and by the bound of the counterfactual; half of
    it after every plan that failed."""
    loss_floor: float = Field(default=0.01, ge=0)
    """A plan may always cost this much loss at first; while it is observed, the network learns to do without."""
    plan_share: float = Field(default=0.1, gt=0, le=1)
    """Share of the network's parameters that one plan may free."""
    cluster_share: float = Field(default=0.5, gt=0, le=1)
    """Share of the units that stand together that one plan may take."""
    budget_share: float = Field(default=0.5, ge=0, lt=1)
    """Share of the parameters at the first measurement that may be freed in the whole run."""
    max_accuracy_drop: float = Field(default=0.02, ge=0, le=1)
    """Held-back accuracy, absolute, that a plan may cost while it is observed, and all plans together; more ends it, or carving."""
    max_loss_rise: float = Field(default=0.1, ge=0)
    """The same where there is no accuracy: relative rise of the held-back loss."""
    failures: int = Field(default=3, ge=1)
    """Plans that may fail before carving ends for this run."""
    halvings: int = Field(default=6, ge=0)
    """How often a plan is halved, the worthier half spared, when the counterfactual does not confirm it."""
