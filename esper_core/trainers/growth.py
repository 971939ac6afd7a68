"""Growing as a guest in a trainer that owns the loop, the optimiser and the checkpoints; what both callbacks share.

    watch ──► (weights are loaded) ──► begin ──► reached, reached, … ──► finish

A trainer restores a run in its own order: weights first, then an optimiser made anew, then its memory, and each strictly. So grown
widths are taken over as the weights come in (``watch``), the optimiser's part of the trainer's checkpoint holds the network's own
parameters only, and what is left (kernels, their memory, the seeds' lives) comes from ``state_dict`` of this module, last of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from esper_core.control.grower import Grower
from esper_core.control.harvest import GrowthReport
from esper_core.control.packet import Budget
from esper_core.control.roles import Controller, KernelSource
from esper_core.control.settings import GrowthSettings
from esper_core.errors import Conflict, Corrupt, InvalidInput
from esper_core.lifecycle import State
from esper_core.log import get
from esper_core.nn.host import Host, Slot
from esper_core.nn.probe import Batch, LossFunction
from esper_core.nn.widen import conform, morphology
from esper_core.trainers.batches import collect, moved
from esper_core.trainers.calling import Call, host_of

log = get(__name__)

VERSION = 1
ROWS = 1024
"""Samples of a data loader that are measured by, unless ``rows`` says otherwise."""

Optimizer = torch.optim.Optimizer


class Options(TypedDict, total=False):
    """What a callback can be told, all of it optional.

    Attributes:
        probe: batches for signals, as the data loaders give them; ``rows`` samples of the training data when absent.
        validation: held-back ones that judge grafts; ``rows`` samples of the validation data when absent.
        rows: samples to take from a loader, 1024.
        within: path of the submodule that is traced and grown, where the whole network cannot be traced.
        spans: (source, sink) module paths; every span found when absent.
        budget, settings, controller, source, run_id, seed: as for ``esper_core.Grower``.
    """

    probe: Sequence[Any]
    validation: Sequence[Any]
    rows: int
    within: str
    spans: Sequence[tuple[str, str]]
    budget: Budget
    settings: GrowthSettings
    controller: Controller
    source: KernelSource
    run_id: str
    seed: int


class Growth:
    """One network's growing inside a trainer.

    Args:
        loss_fn: (outputs, targets) → mean loss over the batch.
        options: see ``Options``.
    """

    def __init__(self, loss_fn: LossFunction, options: Options) -> None:
        unknown = set(options) - set(Options.__annotations__)
        if unknown:
            raise InvalidInput(
                f"no option {', '.join(sorted(unknown))}", hint=f"options: {', '.join(Options.__annotations__)}"
            )
        self.loss_fn, self.options = loss_fn, options
        self.grower: Grower | None = None
        self.report: GrowthReport | None = None
        self.boundaries = 0
        """Epoch boundaries that have been lived."""
        self._ended: Counter[str] = Counter()
        self._born: dict[str, list[int]] = {}
        self._replaced: dict[str, list[int]] = {}
        self._pending: Mapping[str, Any] | None = None
        self._hooks: list[Any] = []
        self._inside = False

    def watch(self, model: nn.Module, optimizer: Callable[[], Optimizer | None] = lambda: None) -> Any:
        """From now on ``model`` takes the widths of the weights that are loaded into it; the handle's ``remove`` ends that.

        Args:
            optimizer: the one there is by then, which gets the new parameters in the old ones' place.
        """
        replaced = self._replaced

        # A plain function without self: copying the network must not copy the run.
        def fit(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
            replaced.update(conform(module, state, prefix, optimizer()))

        return model.register_load_state_dict_pre_hook(fit)  # type: ignore[no-untyped-call]

    def begin(
        self,
        model: nn.Module,
        call: Call,
        optimizers: Sequence[Optimizer],
        split: Callable[[Any], Batch],
        loaders: Mapping[str, Callable[[], Any]],
        epoch: int,
    ) -> dict[str, float]:
        """Find the places to grow and, after ``load_state_dict``, continue there; figures for the log, as of ``reached``.

        Args:
            split: a batch of the data loaders → (inputs, targets).
            loaders: the data loaders for "probe" and "validation"; asked only where the options give no batches.
            epoch: the next one. A checkpoint may be of an epoch's last batch, before its end: that boundary is lived now.

        Raises:
            InvalidInput: when there is no batch, nowhere to grow, or no optimiser over those places.
            Corrupt: when what is resumed does not belong to the weights that were loaded.
        """
        self._leave()
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        options = self.options
        batches = {name: moved(self._batches(name, split, loader), device) for name, loader in loaders.items()}
        inputs = batches["probe"][0][0]
        host = host_of(model, inputs, call, options.get("within", ""), options.get("spans"))
        host.require_slots()
        keys = ("budget", "settings", "controller", "source", "run_id", "seed")
        given: dict[str, Any] = batches | {key: options[key] for key in keys if key in options}  # type: ignore[literal-required]
        optimizer = optimizer_of(host, optimizers)
        self.grower = Grower(host, optimizer, self.loss_fn, **given)
        self.report, self.boundaries = None, epoch
        self._hooks = [optimizer.register_state_dict_post_hook(self._own_parameters)]
        self._resume(morphology(host))
        return self.reached(epoch)

    def reached(self, epoch: int) -> dict[str, float]:
        """Live the boundaries up to the one after ``epoch`` epochs, where that has not been done; figures for the log, if it has."""
        figures: dict[str, float] = {}
        while self.grower is not None and self.boundaries < epoch:
            with self._at_work():
                done = self.grower.step(self.boundaries)
            self.boundaries += 1
            self._ended.update(report.outcome.name.lower() for report in done.reports)
            for event in done.events:
                log.info("seed.moved", slot=event.slot, state=event.target.name, reason=event.reason)
            for command, reason in done.refused:
                log.warning("order.refused", slot=command.slot, order=command.target.name, reason=reason)
            figures = self._counts() | {f"esper/alpha/{s.slot}": self.grower.alpha(s.slot) for s in self.grower.seeds}
            figures |= {f"esper/health/{h.slot}": h.health for h in done.health if h.health is not None}
        return figures

    def finish(self) -> dict[str, float]:
        """Fold what can be folded; the network is plain again and ``report`` says what was done. Figures for the log."""
        if self.grower is None:
            return {}
        with self._at_work():
            _, self.report = self.grower.finish()
        figures = self._counts()
        if self.report.folded_max_abs_diff is not None:
            figures["esper/folded_max_abs_diff"] = self.report.folded_max_abs_diff
        log.info("growing.finished", **{name.removeprefix("esper/"): value for name, value in figures.items()})
        for hook in self._hooks:
            hook.remove()
        self.grower, self._hooks = None, []
        return figures

    def _leave(self) -> None:
        """What a run that was cut off has left in the network: kept where training goes on, taken out where an earlier state comes."""
        if self.grower is None:
            return
        if self._pending is None:
            self.finish()
            return
        for slot in self.grower.plot.host.slots.values():
            self.grower.plot.uproot(slot)
        self.grower = None

    @property
    def kernels(self) -> list[nn.Parameter]:
        """Parameters that the optimiser trains and the network does not list: those of blended kernels."""
        slots: list[Slot] = list(self.grower.plot.host.slots.values()) if self.grower is not None else []
        return [p for slot in slots if slot.graft and slot.graft.attached for p in slot.graft.kernel.parameters()]

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs beside the trainer's own checkpoint: tensors and plain values in dicts and lists."""
        if self._pending is not None:
            return dict(self._pending)
        if self.grower is None and not self._born:
            return {}
        with self._at_work():
            grower = self.grower.state_dict() if self.grower is not None else None
        return {
            "version": VERSION,
            "grower": grower,
            "born": {path: list(shape) for path, shape in self._born.items()},
            "boundaries": self.boundaries,
            "ended": dict(self._ended),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``, as soon as ``begin`` has found the places again."""
        if state.get("version") != VERSION:
            raise Corrupt(f"growing state has version {state.get('version')}, this build reads {VERSION}")
        self._pending = state

    def go_back(self, state: Mapping[str, Any]) -> None:
        """Back to an earlier state of this very run, whose weights are loaded already.

        Raises:
            Corrupt: when the state does not belong to those weights.
        """
        self.load_state_dict(state)
        self._resume({})

    def _batches(self, name: str, split: Callable[[Any], Batch], loader: Callable[[], Any]) -> list[Batch]:
        given: Sequence[Any] | None = self.options.get(name)  # type: ignore[assignment]
        if given is None:
            return collect(loader(), split, self.options.get("rows", ROWS), self.options.get("seed", 0))
        if not given:
            raise InvalidInput(f"there are no {name} rows", hint=f"pass {name}=[...] with a batch or more")
        return [split(batch) for batch in given]

    def _resume(self, present: dict[str, list[int]]) -> None:
        state, self._pending = self._pending, None
        replaced = dict(self._replaced)
        self._replaced.clear()
        born = (state or {}).get("born") or self._born
        if state is None and replaced and not born:
            raise Conflict(
                f"the loaded weights are wider than the network at {', '.join(replaced)}",
                hint="growing left no state beside them; resume from a checkpoint that this callback has written",
            )
        for path, shape in replaced.items():
            if not self._born and path in born and list(born[path]) != shape:
                raise Corrupt(
                    f"{path} began with weight {list(born[path])} and is built with {shape}",
                    hint="resume with the network that the run began with",
                )
        self._born = dict(born) or present
        if state is None:
            return
        self._ended = Counter(state["ended"])
        if state["grower"] is not None:
            self._continue(state["grower"])
            self.boundaries = state["boundaries"]

    def _continue(self, state: Mapping[str, Any]) -> None:
        assert self.grower is not None  # noqa: S101
        plot = self.grower.plot
        saved, loaded = state["plot"]["host"], plot.host.state_dict()
        other = [name for name in loaded if name not in saved or not _same(loaded[name], saved[name])]
        if other:
            raise Corrupt(
                f"the growing state is not of the loaded weights: {other[0]} differs",
                hint="resume from a checkpoint whose files were written together",
            )
        with self._at_work():
            for slot in plot.host.slots.values():
                plot.uproot(slot)
            self.grower.load_state_dict(dict(state))

    def _counts(self) -> dict[str, float]:
        ends = (State.FOSSILIZED, State.CULLED, State.ROLLED_BACK)
        counts = {f"esper/{end.name.lower()}": float(self._ended[end.name.lower()]) for end in ends}
        if self.report is not None:
            return counts | {"esper/added_parameters": float(self.report.added_parameters)}
        assert self.grower is not None  # noqa: S101
        return counts | {"esper/added_parameters": float(self.grower.added_parameters)}

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Growing itself sees all of the optimiser."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def _own_parameters(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
        """The optimiser's state without kernels: what an optimiser made anew over the network can load."""
        foreign = set() if self._inside else {id(parameter) for parameter in self.kernels}
        if not foreign:
            return None
        groups = []
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
            own = [i for p, i in zip(group["params"], saved["params"], strict=True) if id(p) not in foreign]
            groups.append({**saved, "params": own})
        kept = {index for group in groups for index in group["params"]}
        memory = {index: value for index, value in state["state"].items() if index in kept}
        return {**state, "state": memory, "param_groups": groups}


def optimizer_of(host: Host, optimizers: Sequence[Optimizer]) -> Optimizer:
    """The one that trains the network's slots.

    Raises:
        InvalidInput: when there is none, or more than one shares them.
    """
    leaders = {id(slot.leader) for slot in host.slots.values()}
    training = [
        optimizer
        for optimizer in optimizers
        if leaders & {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    ]
    if len(training) != 1:
        raise InvalidInput(
            f"{len(training)} of the trainer's {len(optimizers)} optimisers train the layers that could grow",
            hint="one must hold them all; name other spans, or build it over the network's parameters",
        )
    return training[0]


def _same(left: Any, right: Any) -> bool:
    return isinstance(left, Tensor) and isinstance(right, Tensor) and torch.equal(left.cpu(), right.cpu())
