"""What each state of a seed does at an epoch boundary, and whether it may go on.

One function per state in flight, found by ``STAGES``; each measures, decides and returns the event of its transition, or None
to stay. The order of an adaptation can be read from top to bottom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from esper_core.control.boundary import Boundary
from esper_core.control.packet import RampStyle, SeedEvent
from esper_core.control.seed import Seed
from esper_core.control.settings import GrowthSettings
from esper_core.errors import EsperError
from esper_core.ids import sha256
from esper_core.lifecycle import State
from esper_core.nn.counterfactual import Contribution, contribution
from esper_core.nn.host import Slot
from esper_core.nn.isolated import Lesson, amplify, prepare, scale_output, teach
from esper_core.nn.operations import slowdown
from esper_core.nn.rehearsal import rehearse


def germinated(seed: Seed, slot: Slot, now: Boundary) -> SeedEvent:
    """Ask for the kernel; memory is bounded by the source's cache."""
    now.source.request(seed.kernel_id, slot.interface)
    return seed.advance(State.LOADING, now.epoch, "kernel requested", facts={"memory_granted": True})


def loading(seed: Seed, slot: Slot, now: Boundary) -> SeedEvent | None:
    """Bind the kernel when it has come and is verified."""
    try:
        kernel = now.source.poll(seed.kernel_id)
        if kernel is None:
            waited = now.epoch - seed.since
            if waited < now.plot.settings.loading_epochs:
                return None
            return seed.advance(State.CULLED, now.epoch, f"the kernel did not arrive within {waited} epochs")
        cost, left = kernel.cost(slot.unit_parameters), now.left(seed)
        if left is not None and cost > left:  # one that was ordered by name is known only now
            return seed.advance(
                State.CULLED, now.epoch, f"the kernel costs {cost} parameters, the budget has {left} left"
            )
        graft = now.plot.plant(slot, kernel)
        now.plot.quicken(slot, kernel, seed)
    except EsperError as problem:
        return seed.advance(State.CULLED, now.epoch, f"the kernel could not be had: {problem.message}")
    seed.blueprint_id, seed.blueprint_name = kernel.blueprint.id, kernel.blueprint.name
    seed.parameters = sum(parameter.numel() for parameter in graft.kernel.parameters())
    facts = {"kernel_verified": True, "parameterless": seed.parameters == 0}
    if seed.parameters:
        return seed.advance(State.TRAINING, now.epoch, "kernel verified and bound", facts=facts)
    alpha = _begin_graft(seed, slot, now)
    reason = "kernel verified; it has nothing to learn"
    return seed.advance(State.GRAFTING, now.epoch, reason, facts=facts, alpha=alpha)


def training(seed: Seed, slot: Slot, now: Boundary) -> SeedEvent | None:
    """Learn, isolated, what the host cannot do; graft what carries over to unseen samples, or a kernel that is silent still.

    What a frozen host has no use for may serve one that learns along: a silent kernel harms nothing, and is judged later.
    """
    plot, settings = now.plot, now.plot.settings
    measured = _learn(seed, slot, now)
    learnt = measured["reconstruction"]
    seed.reconstruction = learnt if math.isfinite(learnt) else None
    seed.lessons += 1
    measured["lessons"] = float(seed.lessons)
    if seed.lessons < settings.training_epochs:
        return None
    finite = all(bool(parameter.isfinite().all()) for parameter in plot.kernel(slot).parameters())
    if not finite or not learnt >= settings.min_reconstruction:  # what is not a number is not enough
        if finite and seed.lessons < settings.training_patience:
            return None
        reason = f"{_learnt(settings, learnt)} after {seed.lessons} lessons: not enough"
        return seed.advance(State.CULLED, now.epoch, reason, measurements=_finite(measured))
    alpha = _begin_graft(seed, slot, now)
    facts = {"isolated": True, "reconstructs": True, "finite": True, "trained_long_enough": True}
    reason = _learnt(settings, learnt)
    return seed.advance(State.GRAFTING, now.epoch, reason, facts=facts, measurements=_finite(measured), alpha=alpha)


def _learnt(settings: GrowthSettings, share: float) -> str:
    if share == 0:
        return "learnt nothing that carries over; it is as silent as it came"
    if settings.training_objective == "reconstruction":
        return f"reconstructs {share:.3f} of the wanted update"
    return f"takes {share:.1%} off the held-back loss"


def _learn(seed: Seed, slot: Slot, now: Boundary) -> dict[str, float]:
    """One lesson; what share of the wanted it reached on held-back samples, and what it would take off the probe loss."""
    plot, settings = now.plot, now.plot.settings
    assert slot.graft is not None  # noqa: S101
    drawn = _seed_of(plot.seed, f"{seed.slot}/{seed.generation}", now.epoch)
    steps, rate = settings.training_steps, settings.training_learning_rate
    if settings.training_objective != "reconstruction":
        straight = settings.training_objective == "straight-through"
        gained = rehearse(
            plot.host,
            slot.graft,
            plot.probe,
            plot.loss_fn,
            steps=steps,
            learning_rate=rate,
            seed=drawn,
            straight_through=straight,
        )
        if straight and not math.isnan(gained):
            gained = _scaled(slot, now, prepare(plot.host, slot, plot.probe, plot.loss_fn))
        return {"reconstruction": gained, "probe_gain": gained}
    lesson = prepare(plot.host, slot, plot.probe, plot.loss_fn)
    kernel, batch = plot.kernel(slot), settings.training_batch
    reconstruction = teach(kernel, lesson, steps=steps, learning_rate=rate, batch=batch, seed=drawn)
    last = seed.lessons + 1 >= settings.training_epochs and reconstruction >= settings.min_reconstruction
    return {"reconstruction": reconstruction, "probe_gain": _scaled(slot, now, lesson) if last else 0.0}


def _scaled(slot: Slot, now: Boundary, lesson: Lesson) -> float:
    """Scale what was learnt to the length that helps most; silence it where none does. The loss that this takes off the probe."""
    plot = now.plot
    assert slot.graft is not None  # noqa: S101
    kernel = plot.kernel(slot)
    gained = amplify(plot.host, slot.graft, kernel, lesson, plot.probe, plot.loss_fn)
    if gained <= 0:
        scale_output(kernel, 0.0)
    return gained


def grafting(seed: Seed, slot: Slot, now: Boundary) -> SeedEvent | None:
    """Raise alpha one step along the ramp; rest when it has reached 1."""
    alpha = _raise_alpha(seed, slot, now, now.epoch - seed.since)
    if alpha < 1:
        return None
    epochs = now.epoch - seed.since
    facts = {"alpha_at_rest": True}
    return seed.advance(State.STABILIZATION, now.epoch, f"alpha at 1 after {epochs} epochs", facts=facts, alpha=alpha)


def stabilization(seed: Seed, _slot: Slot, now: Boundary) -> SeedEvent | None:
    """Wait until the loss is back inside the band it had before the graft."""
    settings = now.plot.settings
    rested = now.epoch - seed.since
    if rested < settings.settle_epochs:
        return None
    measured = _finite({"train_loss": now.train_loss, "band": seed.band})
    if now.train_loss <= seed.band:
        return seed.advance(
            State.EVALUATING,
            now.epoch,
            "the loss has settled",
            facts={"settled": True},
            measurements=measured,
            alpha=1.0,
        )
    if rested < settings.settle_patience:
        return None
    reason = f"the loss did not settle within {rested} epochs"
    return seed.advance(State.ROLLED_BACK, now.epoch, reason, measurements=measured)


def evaluating(seed: Seed, slot: Slot, now: Boundary) -> SeedEvent:
    """Same held-back batches with and without the kernel: keep going only on a surely positive difference.

    What goes on learns with the host from here, both softened where that costs next to nothing.
    """
    found, measured = _judge(seed, slot, now)
    if found.lower <= 0:
        return seed.advance(
            State.CULLED, now.epoch, f"contributes {_interval(found)}: not surely positive", measurements=measured
        )
    facts = {"contributes": True, "parameterless": seed.parameters == 0}
    now.plot.let_go(slot)
    if seed.parameters == 0:
        return _fossilize(seed, slot, now, found, facts, measured)
    reason = f"contributes {_interval(found)}"
    if now.alone(seed):
        measured["shrunk"] = now.plot.shrink()
        reason += f"; weights shrunk to {measured['shrunk']:.0%}" if measured["shrunk"] < 1 else ""
    return seed.advance(State.FINE_TUNING, now.epoch, reason, facts=facts, measurements=measured, alpha=1.0)


def fine_tuning(seed: Seed, slot: Slot, now: Boundary) -> SeedEvent | None:
    """Host and kernel learn together; in the end it must still contribute, and more than its rent."""
    settings = now.plot.settings
    if now.epoch - seed.since < settings.fine_tune_epochs:
        return None
    found, measured = _judge(seed, slot, now)
    pays = found.mean - measured["rent"] >= settings.min_contribution
    if found.lower <= 0 or not pays:
        reason = f"contributes {_interval(found)}, rent {measured['rent']:.4g}: not worth keeping"
        return seed.advance(State.CULLED, now.epoch, reason, measurements=measured)
    return _fossilize(seed, slot, now, found, {"contributes": True, "pays_rent": True}, measured)


STAGES: Mapping[State, Callable[[Seed, Slot, Boundary], SeedEvent | None]] = {
    State.GERMINATED: germinated,
    State.LOADING: loading,
    State.TRAINING: training,
    State.GRAFTING: grafting,
    State.STABILIZATION: stabilization,
    State.EVALUATING: evaluating,
    State.FINE_TUNING: fine_tuning,
}


def ramp(progress: float, style: RampStyle) -> float:
    """Alpha at ``progress`` of the way; exactly 0 at 0 and 1 at 1, never falling."""
    x = min(max(progress, 0.0), 1.0)
    if x in (0.0, 1.0) or style in (RampStyle.LINEAR, RampStyle.UNSPECIFIED):
        return x
    if style is RampStyle.COSINE:
        return 0.5 - 0.5 * math.cos(math.pi * x)
    low, here = _logistic(-6.0), _logistic(12.0 * x - 6.0)
    return min(1.0, (here - low) / (1 - 2 * low))


def _begin_graft(seed: Seed, slot: Slot, now: Boundary) -> float:
    """Keep the way back and the loss to come back to, blend the kernel in, and take the ramp's first step."""
    now.keep_snapshot(seed)
    seed.band = now.governor.band(now.plot.settings.settle_sigmas)
    now.plot.blend(slot)
    return _raise_alpha(seed, slot, now, 0)


def _raise_alpha(seed: Seed, slot: Slot, now: Boundary, step: int) -> float:
    assert slot.graft is not None  # noqa: S101
    settings = now.plot.settings
    alpha = ramp((step + 1) / settings.ramp_epochs, seed.style or settings.ramp)
    slot.graft.alpha.fill_(alpha)
    return alpha


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _fossilize(
    seed: Seed, slot: Slot, now: Boundary, found: Contribution, facts: Mapping[str, bool], measured: dict[str, float]
) -> SeedEvent:
    seed.fold_difference = now.plot.fold(slot)
    seed.folded = seed.fold_difference is not None
    if seed.fold_difference is not None:
        measured["folded_max_abs_diff"] = seed.fold_difference
    where = "folded into the host's own weights" if seed.folded else "kept beside the host"
    reason = f"contributes {_interval(found)} after rent {measured['rent']:.4g}; {where}"
    return seed.advance(State.FOSSILIZED, now.epoch, reason, facts=facts, measurements=measured, alpha=1.0)


def _judge(seed: Seed, slot: Slot, now: Boundary) -> tuple[Contribution, dict[str, float]]:
    assert slot.graft is not None  # noqa: S101
    plot = now.plot
    found = contribution(plot.host, slot.graft, plot.validation, plot.loss_fn)
    larger = seed.parameters / plot.host.parameter_count
    slower = slowdown(plot.host, slot, plot.validation[0])
    rent = plot.settings.rent * max(larger, slower) * max(found.loss, 0.0)
    seed.contribution, seed.contribution_lower, seed.rent = (
        value if math.isfinite(value) else None for value in (found.mean, found.lower, rent)
    )
    return found, _finite(
        {"contribution": found.mean, "contribution_lower": found.lower, "rent": rent, "loss": found.loss}
    )


def _interval(found: Contribution) -> str:
    return f"{found.mean:.4g} to the held-back loss (95 % sure of {found.lower:.4g})"


def _finite(measurements: dict[str, float]) -> dict[str, float]:
    """What can travel: JSON and the contracts know no infinities."""
    return {name: value for name, value in measurements.items() if math.isfinite(value)}


def _seed_of(seed: int, who: str, epoch: int) -> int:
    """Equal for equal runs, whatever they are called."""
    return int(sha256(f"{seed}/{who}/{epoch}".encode())[:12], 16)
