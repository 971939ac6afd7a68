"""A run's growing as one tree of tensors and plain values, and back again, bit for bit.

Morphology first: a fresh host takes the grown shapes, then kernels are bound, then weights, the optimiser and the seeds follow.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping
from typing import Any

from esper_core.blueprint.build import KernelModule, build
from esper_core.blueprint.interface import SlotInterface
from esper_core.blueprint.ir import BlueprintIR
from esper_core.control.governor import Governor
from esper_core.control.ledger import REMEMBERED_COMMANDS, Ledger
from esper_core.control.packet import Command, FieldReport
from esper_core.control.plot import Plot
from esper_core.control.seed import Seed
from esper_core.control.survey import Survey
from esper_core.errors import Corrupt
from esper_core.nn.graft import Graft
from esper_core.nn.widen import adopt, morphology, reshape

VERSION = 1


def save(plot: Plot, ledger: Ledger, survey: Survey, governor: Governor) -> dict[str, Any]:
    """The whole state, copied."""
    grafts = {
        slot.name: _save_graft(slot.graft) | {"still": bool(plot.still.get(slot.name))}
        for slot in plot.host.slots.values()
        if slot.graft is not None
    }
    return {
        "version": VERSION,
        "plot": _save_plot(plot),
        "grafts": grafts,
        "blended": _blend_order(plot),
        "seeds": {name: seed.state_dict() for name, seed in ledger.seeds.items()},
        "initial_parameters": ledger.initial_parameters,
        "fold_differences": list(ledger.fold_differences),
        "waiting": [command.model_dump(mode="json") for command in ledger.waiting],
        "applied": list(ledger.applied),
        "snapshots": dict(ledger.snapshots),
        "reports": [report.model_dump(mode="json") for report in ledger.reports],
        "survey": survey.state_dict(),
        "governor": governor.state_dict(),
    }


def load(state: Mapping[str, Any], plot: Plot, ledger: Ledger, survey: Survey, governor: Governor) -> None:
    """Bring a freshly built host, its optimiser and the bookkeeping to the saved state.

    Raises:
        Corrupt: when the state is of another version or another host.
    """
    if state.get("version") != VERSION:
        raise Corrupt(f"growing state has version {state.get('version')}, this build reads {VERSION}")
    if set(state["seeds"]) != set(plot.host.slots):
        raise Corrupt("the saved slots are not those of this host", hint="resume with the same model and spans")
    reshape(plot.host.model, plot.optimizer, state["plot"]["shapes"])
    plot.still.clear()
    for name, saved in state["grafts"].items():
        _load_graft(plot, name, saved)
    for name in state["blended"]:
        slot = plot.host.slots[name]
        adopt(plot.optimizer, slot.leader, list(plot.kernel(slot).parameters()))
    plot.host.load_state_dict(state["plot"]["host"])
    # Unlike after a rollback, learning rates and the like come back too; a copy, or the saved state would train along.
    plot.optimizer.load_state_dict(copy.deepcopy(state["plot"]["optimizer"]))
    run_id = next(iter(ledger.seeds.values())).run_id if ledger.seeds else ""
    ledger.seeds = {name: Seed.from_state_dict(run_id, name, saved) for name, saved in state["seeds"].items()}
    ledger.initial_parameters = state["initial_parameters"]
    ledger.fold_differences = list(state["fold_differences"])
    ledger.waiting = deque(Command.model_validate(command) for command in state["waiting"])
    ledger.applied = deque(state["applied"], maxlen=REMEMBERED_COMMANDS)
    ledger.snapshots = dict(state["snapshots"])
    ledger.reports = [FieldReport.model_validate(report) for report in state["reports"]]
    survey.load_state_dict(state["survey"])
    governor.load_state_dict(state["governor"])


def _save_plot(plot: Plot) -> dict[str, Any]:
    """Host and optimiser, blended kernels included."""
    return copy.deepcopy(
        {
            "shapes": morphology(plot.host),
            "host": dict(plot.host.state_dict()),
            "optimizer": plot.optimizer.state_dict(),
        }
    )


def _blend_order(plot: Plot) -> list[str]:
    """Slots whose kernel the optimiser trains, in the order in which its groups hold them."""
    place = {
        id(parameter): index
        for index, parameter in enumerate(p for group in plot.optimizer.param_groups for p in group["params"])
    }
    found = {}
    for name, slot in plot.host.slots.items():
        first = next(slot.graft.kernel.parameters(), None) if slot.graft is not None else None
        if first is not None and id(first) in place:
            found[name] = place[id(first)]
    return sorted(found, key=found.__getitem__)


def _save_graft(graft: Graft) -> dict[str, Any]:
    kernel = graft.kernel
    assert isinstance(kernel, KernelModule)  # noqa: S101
    return {
        "blueprint": kernel.ir.model_dump(mode="json"),
        "interface": kernel.interface.model_dump(mode="json"),
        "symbols": dict(kernel.symbols),
        "weights": {name: value.detach().clone() for name, value in kernel.state_dict().items()},
        "alpha": graft.alpha.clone(),
        "faults": graft.faults.clone(),
        "raised": graft.raised,
        "attached": graft.attached,
    }


def _load_graft(plot: Plot, name: str, saved: Mapping[str, Any]) -> None:
    slot = plot.host.slots[name]
    slot.release()
    blueprint = BlueprintIR.model_validate(saved["blueprint"])
    kernel = build(blueprint, SlotInterface.model_validate(saved["interface"]), saved["symbols"])
    kernel.load_state_dict(saved["weights"])
    graft = slot.bind(kernel)
    graft.alpha.copy_(saved["alpha"])
    graft.faults.copy_(saved["faults"])
    graft.raised = saved["raised"]
    if saved["attached"]:
        graft.attach()
    if saved["still"]:
        plot.hold_still(slot)
