"""Every constant of growing, in one place, with its default. Times are epochs unless a name says otherwise."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from esper_core.control.packet import RampStyle


class Settings(BaseModel):
    """Frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class HeuristicSettings(Settings):
    """When the heuristic policy acts, and how boldly."""

    health_threshold: float = Field(default=0.3, gt=0, lt=1)
    """Act only on slots whose health is below this."""
    confidence_threshold: float = Field(default=0.7, ge=0, le=1)
    """Act only when both of the last two evaluations are at least this sure."""
    coverage: float = Field(default=0.99, gt=0, le=1)
    """Take the cheapest kernel that covers this share of the first-order gain."""
    adaptations_per_epoch: int = Field(default=2, ge=0, le=2)
    """At most this many germinations at one epoch boundary."""
    in_flight: int = Field(default=1, ge=1, le=64)
    """Grafts that may be under way at once; 1 keeps credit clear."""
    solved: float = Field(default=0.05, ge=0, lt=1)
    """Wait when, at its present pace, the run would by then have less than this share of its first loss left."""
    horizon_epochs: int = Field(default=7, ge=0)
    """Then: epochs from germination until a graft is judged."""


class GovernorSettings(Settings):
    """When a blended graft is thrown out at once."""

    window: int = Field(default=20, ge=2)
    """Epoch losses remembered."""
    sigmas: float = Field(default=6.0, gt=0)
    ratio: float = Field(default=3.0, gt=1)
    floor: float = Field(default=0.1, ge=0)
    """Losses below this are never alarming."""
    patience: int = Field(default=3, ge=1)
    """Alarming losses in a row before it acts; a non-finite one acts at once."""


class GrowthSettings(Settings):
    """How seeds are measured, moved and judged."""

    warmup_epochs: int = Field(default=5, ge=0)
    """Epochs before the first evaluation: an undertrained host looks narrow everywhere."""
    evaluate_every: int = Field(default=2, ge=1)
    """Epochs between evaluations; evidence must hold in two of them."""
    evaluate_at_most_every: int = Field(default=16, ge=1)
    """Epochs that may lie between two evaluations: the time doubles with each one that finds all slots healthy."""
    glance: float = Field(default=0.25, gt=0, le=1)
    """Share of the probe after which an evaluation ends if every slot is surely healthy by then; 1 = never."""
    share: float = Field(default=0.5, gt=0, lt=1)
    """Evidence threshold: share of the wanted update that the present span cannot make."""
    gain_of_loss: float = Field(default=0.002, gt=0)
    """Evidence threshold: first-order gain as a fraction of the loss that the run began with."""
    policy: HeuristicSettings = HeuristicSettings()
    governor: GovernorSettings = GovernorSettings()
    widths: tuple[int, ...] = (4, 8, 16, 32)
    """Units that the built-in catalogue offers where a blueprint has a width."""
    embargo_epochs: int = Field(default=5, ge=0)
    """How long a slot rests after a cull or a rollback."""
    loading_epochs: int = Field(default=20, ge=1)
    """Boundaries that a kernel may take to arrive before the seed is culled."""
    training_objective: Literal["reconstruction", "straight-through", "task"] = "task"
    """What an isolated kernel learns: the update the span cannot make, the loss's own gradient, or the loss it would bring."""
    training_epochs: int = Field(default=1, ge=1)
    """Boundaries of isolated training before the gate."""
    training_patience: int = Field(default=2, ge=1)
    """Boundaries of isolated training after which a failing gate culls."""
    training_steps: int = Field(default=60, ge=1)
    """Isolated optimiser steps at each of them."""
    training_batch: int = Field(default=256, ge=1)
    training_learning_rate: float = Field(default=1e-2, gt=0)
    min_reconstruction: float = Field(default=0.0, lt=1)
    """Held-back share of the wanted that the kernel must reach; at 0, one that learnt nothing may go on, silent as it came."""
    ramp_epochs: int = Field(default=3, ge=1)
    """Epochs alpha takes from 0 to 1."""
    ramp: RampStyle = RampStyle.COSINE
    frozen: Literal["span", "host", "none"] = "span"
    """What holds still from GRAFTING to EVALUATING: the spanned layers, the whole host, or nothing."""
    settle_epochs: int = Field(default=1, ge=0)
    """Epochs of rest before the counterfactual."""
    settle_patience: int = Field(default=6, ge=1)
    """Epochs after which an unsettled loss is a rollback."""
    settle_sigmas: float = Field(default=3.0, gt=0)
    """Settled = back within this many deviations of the loss before the graft."""
    smallest_shrink: float = Field(default=0.5, gt=0, le=1)
    """When host and kernel begin to learn together their weights are scaled down, to this at most: a network that is sure of itself
    learns little that is new. 1 = never."""
    shrink_rise: float = Field(default=0.05, ge=0)
    """Share by which the held-back loss may rise at that moment; what would cost more is not shrunk as far, or not at all."""
    fine_tune_epochs: int = Field(default=3, ge=1)
    """Epochs that kernel and host learn together before the last judgement."""
    rent: float = Field(default=0.01, ge=0)
    """Share of the loss that doubling the host must bring, in parameters or in operations, whichever grows more; less growth pays
    proportionally less."""
    min_contribution: float = Field(default=0.0, ge=0)
    """Loss units that a graft must bring above its rent."""
    kernel_faults: int = Field(default=0, ge=0)
    """Failed forward passes that a blended kernel may have before it is rolled back."""
    cache_bytes: int = Field(default=128 * 1024 * 1024, ge=0)
    """Bytes of kernels kept at hand."""
