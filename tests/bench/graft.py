"""What a blended kernel costs each step, and that after folding nothing of that cost is left."""

from __future__ import annotations

import torch
from torch import nn

from esper_core.blueprint.build import build
from esper_core.blueprint.catalogue import catalogue
from esper_core.nn.host import Host
from esper_core.nn.widen import adopt, fold
from tests.bench.bench import Pace, Table
from tests.bench.dormant import families, wrapped
from tests.bench.figures import interleaved, ratio_row
from tests.bench.nets import Family, adam, fresh, step_of

UNITS = 8
KERNELS = {
    "MLP": "bottleneck_mlp",
    "CNN": "conv_bypass_3x3",
    "ResNet": "conv_bypass_3x3",
    "transformer": "bottleneck_mlp",
}


def run(pace: Pace) -> list[Table]:
    rows, folded = [], []
    for family in families(pace, 1):
        pace.say(family.name)
        batch = family.rows(family.batch)
        bare = fresh(family)
        blended, optimizer, kernel = grown(family)
        works = {"bare": step_of(bare, adam(bare), batch), "blended": step_of(blended, optimizer, batch)}
        plain, its = _folded(family)
        if plain is not None:
            native = fresh(family, UNITS)
            again = fresh(family, UNITS)
            works |= {
                "native": step_of(native, adam(native), batch),
                "folded": step_of(plain, its, batch),
                "again": step_of(again, adam(again), batch),
            }
        found = interleaved(works, rounds=pace.rounds(50, 24), clock=family.clock)
        rows.append(ratio_row(f"{family.name}: {kernel} × {UNITS} blended / without", found["blended"], found["bare"]))
        if plain is None:
            continue
        rows.append(ratio_row(f"{family.name}: folded / without", found["folded"], found["bare"]))
        folded += [
            ratio_row(f"{family.name}: folded / natively wider", found["folded"], found["native"]),
            ratio_row(f"{family.name}: natively wider, again", found["again"], found["native"]),
        ]
    return [
        Table("Training step with a grown part / without", rows, ("Kernel and host both train, alpha at 1.",)),
        Table(
            "Training step after folding / of a network built that wide",
            folded,
            ("'again' is the noise floor.",),
        ),
    ]


def grown(family: Family) -> tuple[Host, torch.optim.Optimizer, str]:
    """A host with a kernel of ``UNITS`` units blended in at alpha 1, its optimiser, and the blueprint's name."""
    host = wrapped(family)
    slot = host.slots[family.slot_name]
    name = KERNELS[family.name.split()[0]]
    kernel = build(catalogue()[name], slot.interface, {"width": UNITS}, seed=0)
    for parameter in kernel.parameters():  # its way out is zero at first: give it something to add
        nn.init.normal_(parameter, std=0.01)
    optimizer = adam(host)
    graft = slot.bind(kernel)
    graft.attach()
    graft.alpha.fill_(1.0)
    adopt(optimizer, slot.leader, list(kernel.parameters()))
    return host, optimizer, name


def _folded(family: Family) -> tuple[nn.Module | None, torch.optim.Optimizer]:
    """The plain network that folding leaves, or None where the algebra does not allow it."""
    host, optimizer, _ = grown(family)
    step_of(host, optimizer, family.rows(family.batch))()  # so that the optimiser has a memory to migrate
    done = fold(host, host.slots[family.slot_name], optimizer)
    return (host.model if done else None), optimizer
