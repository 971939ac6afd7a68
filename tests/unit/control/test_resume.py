"""A run that was cut off and resumed is the run that was not, bit for bit, wherever in a seed's life the cut falls."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from esper_core.control.packet import Command, SeedEvent
from esper_core.errors import Corrupt
from esper_core.lifecycle import State
from esper_core.nn import checkpoint
from tests.unit.control.growing import LEARNING, Late, Run, germinate, order, settings
from tests.unit.nn.hosts import equal


@dataclass(frozen=True)
class Story:
    """What happens in a run: its kind, and what is ordered before which epoch's boundary."""

    epochs: int
    family: str = "mlp"
    germinate: dict[int, tuple[str, str]] = field(default_factory=dict)
    orders: dict[int, tuple[str, State]] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    arrives: int | None = None
    """Epoch before which no kernel comes; there at once when None."""
    visits: tuple[State, ...] = ()
    """States that it must show, or the test proves nothing."""

    def run(self) -> Run:
        def rule(parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.Adam(parameters, 1e-2, amsgrad=True)

        source = {} if self.arrives is None else {"source": Late()}
        return Run(self.family, rule, seed=1, **self.options, **source)

    def live(self, run: Run, epoch: int) -> None:
        if isinstance(run.grower.source, Late):
            run.grower.source.open = self.arrives is not None and epoch >= self.arrives
        if epoch in self.germinate:
            slot, blueprint = self.germinate[epoch]
            germinate(run.grower, slot, blueprint, command_id=f"command-{epoch}")
        if epoch in self.orders:
            slot, target = self.orders[epoch]
            run.grower.command(order(slot, target, command_id=f"order-{epoch}"))
        run.epoch(epoch, self.losses.get(epoch))


S = State
STORIES = {
    "a whole life": Story(
        18,
        germinate={4: ("2:4", "bottleneck_mlp")},
        visits=(S.LOADING, S.TRAINING, S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING, S.FOSSILIZED),
    ),
    "kept beside": Story(
        16,
        family="tanh",
        germinate={4: ("2:4", "low_rank")},
        visits=(S.FINE_TUNING, S.FOSSILIZED),
    ),
    "across a norm": Story(
        15,
        family="resnet",
        germinate={2: ("layer.0.conv1:layer.0.conv2", "conv_bypass_3x3")},
        visits=(S.TRAINING, S.GRAFTING, S.FINE_TUNING, S.FOSSILIZED),
    ),
    "rolled back and tried again": Story(
        20,
        germinate={2: ("2:4", "bottleneck_mlp"), 13: ("0:2", "bottleneck_mlp")},
        losses={5: float("inf")},
        visits=(S.GRAFTING, S.ROLLED_BACK, S.DORMANT),
    ),
    "a kernel long on its way": Story(
        10,
        germinate={2: ("2:4", "bottleneck_mlp")},
        arrives=5,
        options={"settings": settings(loading_epochs=5, training_epochs=3)},
        visits=(S.LOADING, S.TRAINING, S.GRAFTING),
    ),
    "ordered away": Story(
        12,
        germinate={2: ("2:4", "bottleneck_mlp")},
        orders={5: ("2:4", S.CULLED)},
        options={"settings": LEARNING},
        visits=(S.TRAINING, S.CULLED, S.DORMANT),
    ),
    "by its own need": Story(
        30,
        options={"controller": None, "settings": settings(warmup_epochs=4, training_steps=30)},
        visits=(S.GERMINATED, S.GRAFTING, S.FOSSILIZED),
    ),
}


def told(events: list[SeedEvent]) -> list[tuple[Any, ...]]:
    """What events say, without ids that are new in every process."""
    return [
        (e.seed_id, e.source, e.target, e.epoch, e.reason, e.alpha, e.kernel_id, sorted(e.measurements.items()))
        for e in events
    ]


@pytest.mark.parametrize("name", STORIES)
def test_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    """From every cut a few epochs are lived again; their end is a whole state, so what follows it is the same too."""
    story = STORIES[name]
    whole = story.run()
    states = []
    for epoch in range(story.epochs):
        states.append(whole.grower.state_dict())
        checkpoint.save(tmp_path / str(epoch), states[-1])
        story.live(whole, epoch)
    states.append(whole.grower.state_dict())
    assert set(story.visits) <= {event.target for event in whole.events}
    # After each change, and in the midst of what takes longer.
    cuts = {event.epoch + 1 + late for event in whole.events for late in (0, event.target in (S.LOADING, S.TRAINING))}
    for cut in sorted(cuts & set(range(story.epochs))):
        saved = checkpoint.load(tmp_path / str(cut))
        assert equal(saved, states[cut]), "the state taken at the cut changed while the run went on"
        end = min(cut + 2, story.epochs)
        again = story.run()
        again.grower.load_state_dict(saved)
        for epoch in range(cut, end):
            story.live(again, epoch)
        assert told(again.events) == told([event for event in whole.events if cut <= event.epoch < end]), cut
        assert equal(without_ids(again.grower.state_dict()), without_ids(states[end])), cut


def test_a_resumed_run_ends_alike() -> None:
    story = STORIES["a whole life"]
    whole, again = story.run(), story.run()
    for epoch in range(story.epochs):
        if epoch == 9:
            assert whole.seed("2:4").state is S.FINE_TUNING
            again.grower.load_state_dict(whole.grower.state_dict())
        for run in (whole, again) if epoch >= 9 else (whole,):
            story.live(run, epoch)
    (plain, report), (its_plain, its_report) = whole.grower.finish(), again.grower.finish()
    assert equal(dict(plain.state_dict()), dict(its_plain.state_dict()))
    assert report.fossilized == its_report.fossilized == 1
    assert report.added_parameters == its_report.added_parameters > 0
    assert report.folded_max_abs_diff == its_report.folded_max_abs_diff


def without_ids(state: dict[str, Any]) -> dict[str, Any]:
    """The state, without ids that are new in every process."""
    seeds = {slot: {k: v for k, v in seed.items() if k != "command_id"} for slot, seed in state["seeds"].items()}
    reports = [{k: v for k, v in r.items() if k not in ("report_id", "command_id")} for r in state["reports"]]
    return state | {"seeds": seeds, "reports": reports, "applied": len(state["applied"])}


def test_an_order_that_waits_survives(tmp_path: Path) -> None:
    first = Run(seed=1)
    first.epochs(0, 2)
    command = germinate(first.grower, "2:4")
    checkpoint.save(tmp_path / "c", first.grower.state_dict())
    second = Run(seed=1)
    second.grower.load_state_dict(checkpoint.load(tmp_path / "c"))
    second.epoch(2)
    assert [event.command_id for event in second.events if event.target is S.GERMINATED] == [command.command_id]


def test_an_order_obeyed_before_the_cut_is_not_obeyed_again() -> None:
    first = Run(seed=1, settings=LEARNING)
    command = germinate(first.grower, "2:4")
    first.epoch(0)
    first.grower.command(order("2:4", State.CULLED, command_id="stop"))
    first.epoch(1)
    assert first.seed("2:4").state is State.CULLED
    second = Run(seed=1, settings=LEARNING)
    second.grower.load_state_dict(first.grower.state_dict())
    again: list[Command] = [command, order("2:4", State.CULLED, command_id="stop")]
    for repeated in again:
        second.grower.command(repeated)
    second.epoch(2)
    assert second.events == []
    assert second.refused == []


def test_a_learning_rate_of_the_schedule_is_resumed() -> None:
    first = Run(seed=1)
    first.optimizer.param_groups[0]["lr"] = 0.123
    second = Run(seed=1)
    second.grower.load_state_dict(first.grower.state_dict())
    assert second.optimizer.param_groups[0]["lr"] == 0.123


def test_what_held_still_still_does() -> None:
    first = Run(seed=1)
    germinate(first.grower, "2:4")
    first.until(State.STABILIZATION, "2:4", 0)
    second = Run(seed=1)
    second.grower.load_state_dict(first.grower.state_dict())
    still = [name for name, parameter in second.host.named_parameters() if not parameter.requires_grad]
    assert still == ["model.2.weight", "model.2.bias", "model.4.weight", "model.4.bias"]


def test_the_state_of_another_host_or_version_is_refused() -> None:
    state = Run(seed=1).grower.state_dict()
    with pytest.raises(Corrupt):
        Run("cnn").grower.load_state_dict(state)
    with pytest.raises(Corrupt):
        Run(seed=1).grower.load_state_dict(state | {"version": 99})
