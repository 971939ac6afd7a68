"""What wrapping costs while nothing grows, and while a seed learns in isolation: training steps against the bare model."""

from __future__ import annotations

from torch import nn

from esper_core.control.grower import Grower
from esper_core.control.packet import Command
from esper_core.control.settings import GrowthSettings
from esper_core.ids import new_id
from esper_core.lifecycle import State
from esper_core.nn.host import Host, wrap
from tests.bench.bench import Pace, Table
from tests.bench.figures import interleaved, ratio_row
from tests.bench.nets import FAMILIES, Family, adam, fresh, step_of

NEVER = 1_000_000


def run(pace: Pace) -> list[Table]:
    rows = []
    for family in families(pace, 2):
        pace.say(family.name)
        batch = family.rows(family.batch)
        bare, again, dormant, training = fresh(family), fresh(family), wrapped(family), wrapped(family)
        optimizer = in_training(family, training)
        works = {
            "bare": step_of(bare, adam(bare), batch),
            "again": step_of(again, adam(again), batch),
            "dormant": step_of(dormant, adam(dormant), batch),
            "training": step_of(training, optimizer, batch),
        }
        found = interleaved(works, rounds=pace.rounds(60, 24), clock=family.clock)
        rows += [
            ratio_row(f"{family.name}: {len(dormant.slots)} dormant slots", found["dormant"], found["bare"]),
            ratio_row(f"{family.name}: one seed in TRAINING", found["training"], found["bare"]),
            ratio_row(f"{family.name}: the bare model again", found["again"], found["bare"]),
        ]
    return [
        Table(
            "Training step of the wrapped host / of the bare model",
            rows,
            (
                "'the bare model again' is the noise floor: a second copy of the same bare model, timed the same way.",
                "Eager, one thread, processor time (on a GPU its own); TRAINING was reached through the grower, the kernel is bound and "
                "learns at boundaries.",
            ),
        )
    ]


def families(pace: Pace, few: int) -> list[Family]:
    """Every family, or the first ``few`` for a glance, on the device that is measured."""
    return [family.on(pace.device) for family in (FAMILIES[:few] if pace.quick else FAMILIES)]


def wrapped(family: Family) -> Host:
    """A host with the same weights as ``fresh`` gives."""
    return wrap(fresh(family), family.rows(2)[0])


def in_training(family: Family, host: Host) -> object:
    """Bring the family's slot to TRAINING, where it stays; the host's optimiser."""
    optimizer = adam(host)
    rows = [family.rows(64)]
    settings = GrowthSettings(warmup_epochs=NEVER, training_epochs=NEVER, training_patience=NEVER)
    loss = nn.functional.cross_entropy
    grower = Grower(host, optimizer, loss, probe=rows, validation=rows, settings=settings)
    offers = grower.source.candidates(host.slots[family.slot_name].interface)
    order = Command(
        command_id=new_id(),
        run_id=grower.run_id,
        slot=family.slot_name,
        target=State.GERMINATED,
        kernel_id=max(offers, key=lambda offer: offer.width).kernel_id,
        issued_by="operator",
    )
    grower.command(order)
    state = State.DORMANT
    for epoch in range(4):
        grower.step(epoch, train_loss=1.0)
        state = next(seed.state for seed in grower.seeds if seed.slot == family.slot_name)
        if state is State.TRAINING:
            return optimizer
    raise RuntimeError(f"the seed is {state.name}, not TRAINING")
