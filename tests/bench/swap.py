"""How long training stands still at the boundaries of a graft's life: its kernel bound, taught, blended, raised, judged, folded."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from esper_core.control.grower import Grower
from esper_core.control.packet import AdaptationSignal, Command, SeedEvent, SystemStatePacket
from esper_core.control.settings import GrowthSettings
from esper_core.ids import new_id
from esper_core.lifecycle import State
from esper_core.nn.host import Host, wrap
from esper_core.nn.probe import Batch
from tests.bench.bench import Pace, Table
from tests.bench.device import settled
from tests.bench.dormant import families
from tests.bench.figures import Row, Sample, block
from tests.bench.graft import KERNELS, UNITS
from tests.bench.nets import CLASSES, Family, adam, step_of

NEVER = 1_000_000
ROWS, BATCH = 1024, 256
STARVE = {"MLP": 126, "CNN": 30, "ResNet": 14, "transformer": 126}
"""Units taken from the layer that the slot spans; two are left."""
LIFE = 40
"""Epochs in which a life must have ended."""
SETTINGS = GrowthSettings(
    warmup_epochs=NEVER, widths=(UNITS,), training_epochs=1, training_patience=1, min_reconstruction=-NEVER, rent=0.0
)
"""One lesson, no rent: what is timed is the work, not whether it pays."""


class Silent:
    """Growth by order only."""

    def decide(self, packet: SystemStatePacket) -> AdaptationSignal | None:
        return None


def run(pace: Pace) -> list[Table]:
    rows = []
    for family in families(pace, 1):
        pace.say(family.name)
        rows += _lives(family, pace.rounds(3, 1))
    return [
        Table(
            "An epoch boundary at which a seed changes, in training steps",
            rows,
            (
                f"Wall clock, slots not measured at these boundaries; probe of {ROWS} rows, held back {ROWS}. The first boundary orders "
                "the kernel, binds it and goes on as far as it can: it teaches the kernel, keeps a way back and blends it in; the first "
                "three rows are what of that is not teaching. The last one folds it and "
                "compares the outputs in float64. Kernels are built in this process.",
            ),
        )
    ]


def _lives(family: Family, lives: int) -> list[Row]:
    found: dict[str, list[float]] = {}
    for number in range(lives + 1):
        pauses, step_seconds = _life(family)
        if number:  # the first warms everything up
            for what, seconds in pauses:
                found.setdefault(what, []).append(seconds / step_seconds)
                found.setdefault(f"{what} ms", []).append(seconds * 1e3)
    rows = []
    for what in (name for name in found if not name.endswith(" ms")):
        row = Sample(tuple(found[what])).row(f"{family.name}: {what}", "steps")
        rows.append({key: row[key] for key in row if key != "p99"} | {"ms": Sample(tuple(found[f"{what} ms"])).median})
    return rows


def _life(family: Family) -> tuple[list[tuple[str, float]], float]:
    """Every boundary of one seed's life with its wall seconds, and the seconds of a training step before it."""
    host = _starved(family)
    optimizer = adam(host)
    inputs, targets = _learnable(family)
    rows = list(zip(inputs.split(BATCH), targets.split(BATCH), strict=True))
    loss = nn.functional.cross_entropy
    grower = Grower(host, optimizer, loss, probe=rows, validation=rows, settings=SETTINGS, controller=Silent())
    step = step_of(host, optimizer, family.rows(family.batch))
    step_seconds = family.clock(step, block(step, family.clock))
    grower.command(_order(family, grower))
    pauses = _parts(family, grower)
    for epoch in range(LIFE):
        settled(family.device)
        began = time.perf_counter()
        report = grower.step(epoch, train_loss=1.0)
        settled(family.device)
        seconds = time.perf_counter() - began
        pauses.append((_told(report.events, grower, family), seconds))
        if any(event.target in (State.FOSSILIZED, State.CULLED, State.ROLLED_BACK) for event in report.events):
            return pauses, step_seconds
    raise RuntimeError(f"the seed's life did not end within {LIFE} epochs")


def _told(events: tuple[SeedEvent, ...], grower: Grower, family: Family) -> str:
    """The way a seed went at one boundary."""
    if not events:
        state = next(seed.state for seed in grower.seeds if seed.slot == family.slot_name)
        return f"{state.name}, no change"
    between = " → …" if len(events) > 1 else ""
    return f"{events[0].source.name}{between} → {events[-1].target.name}"


def _parts(family: Family, grower: Grower) -> list[tuple[str, float]]:
    """What of the boundary that binds and blends is neither teaching nor measuring; nothing of it stays."""
    plot, slot = grower.plot, grower.plot.host.slots[family.slot_name]
    offer = max(grower.source.candidates(slot.interface), key=lambda offer: offer.width)
    grower.source.request(offer.kernel_id, slot.interface)
    kernel = grower.source.poll(offer.kernel_id)
    assert kernel is not None
    works: dict[str, Callable[[], object]] = {
        "binding, alone": partial(plot.plant, slot, kernel),
        "keeping a way back, alone": plot.snapshot,
        "blending in, alone": partial(plot.blend, slot),
    }
    found = []
    for what, work in works.items():
        settled(family.device)
        began = time.perf_counter()
        work()
        settled(family.device)
        found.append((what, time.perf_counter() - began))
    plot.uproot(slot)
    return found


def _starved(family: Family) -> Host:
    """The family's network with so narrow a layer in the span that a kernel has something to bring."""
    torch.manual_seed(0)
    return wrap(family.make(-STARVE[family.name.split()[0]]).to(family.device), family.rows(2)[0])


def _learnable(family: Family) -> Batch:
    """Rows whose targets can be told from what enters: a kernel that helps nobody never gets as far as being folded."""
    inputs, targets = family.rows(ROWS)
    if family.tokens:
        return inputs, inputs[:, 0] % CLASSES
    centres, _ = family.rows(CLASSES, seed=1)
    return inputs + centres[targets], targets


def _order(family: Family, grower: Grower) -> Command:
    offers = grower.source.candidates(grower.plot.host.slots[family.slot_name].interface)
    wanted = KERNELS[family.name.split()[0]]
    return Command(
        command_id=new_id(),
        run_id=grower.run_id,
        slot=family.slot_name,
        target=State.GERMINATED,
        kernel_id=next(offer.kernel_id for offer in offers if offer.blueprint_name == wanted),
        issued_by="operator",
    )
