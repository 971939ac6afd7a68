"""Silencing units on trial: what they write is read as zero, everywhere it is read, and nothing else changes.

Masking where output is read, and not where it is written, is what makes a silenced unit equal to one that is gone: between the two
stand activations and norms that need not map zero to zero. No gradient reaches a silenced unit's rows or columns, but an optimiser's
momentum and weight decay still move them; so they are kept when the units fall asleep and put back, the optimiser's memory of them
included, when they wake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esper_core.nn.carve.anatomy import Cluster, Part
from esper_core.nn.graft import blended
from esper_core.nn.mark import mark, unmark

Kept = dict[str, Tensor]
"""Slices of one parameter and of the optimiser's memory of it; ``""`` is the parameter's own."""


class Sedation:
    """Some units of one cluster, silenced or ready to be.

    Args:
        model: whose units they are.
        cluster: theirs.
        units: numbers in the cluster.
    """

    def __init__(self, model: nn.Module, cluster: Cluster, units: Sequence[int]) -> None:
        self.cluster = cluster
        self.units = frozenset(units)
        self._model = model
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def asleep(self) -> bool:
        """Whether the network's forward goes without the units."""
        return bool(self._hooks)

    def module(self, part: Part) -> nn.Module:
        """The module that a part of the cluster is of."""
        return self._model.get_submodule(part.path)

    def attach(self) -> None:
        """From now on the units are read as zero."""
        if self._hooks:
            return
        for part in self.cluster.readers:
            module = self.module(part)
            mask = _Mask(part.of(self.units), 1 if isinstance(module, nn.Conv2d) else -1)
            # Before every other hook: a kernel that reads what enters here reads what the layer reads.
            self._hooks.append(module.register_forward_pre_hook(mask, prepend=True))
            for around in self._around(part):
                mark(around)

    def detach(self) -> None:
        """The network's forward is as it was before ``attach``, bit for bit."""
        for hook in self._hooks:
            hook.remove()
        for part in self.cluster.readers if self._hooks else ():
            for around in self._around(part):
                (mark if blended(around) else unmark)(around)
        self._hooks = []

    def keep(self, optimizer: torch.optim.Optimizer | None) -> dict[str, Kept]:
        """Copies of the units' own numbers, by role, module and name of the parameter."""
        kept: dict[str, Kept] = {}
        for key, parameter, dim, places in self._slices():
            index = torch.tensor(places, device=parameter.device)
            kept[key] = {"": parameter.detach().index_select(dim, index)}
            for name, value in _memory(optimizer, parameter).items():
                kept[key][name] = value.index_select(dim, index)
        return kept

    @torch.no_grad()
    def put_back(self, kept: Mapping[str, Kept], optimizer: torch.optim.Optimizer | None) -> None:
        """Give the units the numbers they had when they were kept; others, also such as have been added since, stay."""
        for key, parameter, dim, places in self._slices():
            memory: dict[str, Tensor] = {"": parameter.data, **_memory(optimizer, parameter)}
            for name, slices in kept[key].items():
                if name not in memory:
                    continue
                target = memory[name]
                for other, size in enumerate(slices.shape):
                    if other != dim:
                        target = target.narrow(other, 0, size)
                target.index_copy_(dim, torch.tensor(places, device=target.device), slices.to(target))

    def _around(self, part: Part) -> list[nn.Module]:
        """A part's module and those that contain it: compiled, some of them run their parts without calling them."""
        names = part.path.split(".")
        return [self._model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)]

    def _slices(self) -> Iterator[tuple[str, nn.Parameter, int, list[int]]]:
        """(key, parameter, dimension, places) of everything that is the units' own."""
        for part in self.cluster.parts:
            module = self.module(part)
            for name, dim in cut(part, module):
                parameter = getattr(module, name)
                if isinstance(parameter, nn.Parameter):
                    yield f"{part.role} {part.path}.{name}", parameter, dim, part.of(self.units)


def cut(part: Part, module: nn.Module) -> list[tuple[str, int]]:
    """(name, dimension) of the module's tensors that a part's places are places of."""
    if part.role == "reads":
        return [("weight", 1)]
    names = ["weight", "bias"]
    if part.role == "norm":
        names += ["running_mean", "running_var"]
    return [(name, 0) for name in names if getattr(module, name, None) is not None]


class _Mask:
    """A pre-hook that zeroes some features or channels of what enters a module."""

    silences = True

    def __init__(self, places: list[int], dim: int) -> None:
        self.places = torch.tensor(places)
        self.dim = dim

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        entering: Tensor = args[0]
        # By index, so that columns which are added meanwhile are none of its business; and a NaN is silenced too.
        return entering.index_fill(self.dim, self.places.to(entering.device), 0), *args[1:]


def _memory(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What an optimiser remembers of a parameter, element by element."""
    if optimizer is None or parameter not in optimizer.state:
        return {}
    state = optimizer.state[parameter].items()
    return {name: value for name, value in state if isinstance(value, Tensor) and value.shape == parameter.shape}


def silencing(sedations: Sequence[Sedation]) -> Callable[[bool], None]:
    """A switch for all of them: True silences."""

    def switch(silent: bool) -> None:
        for sedation in sedations:
            (sedation.attach if silent else sedation.detach)()

    return switch
