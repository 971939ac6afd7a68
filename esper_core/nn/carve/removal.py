"""Taking units out for good: smaller tensors wherever they appear, the optimiser's memory of what stays carried along.

Compared before it counts: the smaller network must give what the network with the units silenced gives, or everything is put back,
the very same tensors, and the reason is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from esper_core.errors import Conflict
from esper_core.nn.carve.anatomy import Cluster, Layer, Norm
from esper_core.nn.carve.sedation import Sedation, cut
from esper_core.nn.chance import undisturbed

TOLERANCE = 1e-5
"""Largest change of an output, relative to the largest output."""


@dataclass(frozen=True)
class Removed:
    """What came of a removal.

    Attributes:
        difference: largest absolute change of an output against the network with the units silenced.
        scale: largest absolute output.
        parameters: freed.
    """

    difference: float
    scale: float
    parameters: int


def remove(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    sedations: Sequence[Sedation],
    batches: Iterable[tuple[Any, ...]],
    tolerance: float = TOLERANCE,
) -> Removed:
    """Take the units of ``sedations`` out of the network and compare; their masks are gone afterwards.

    Args:
        model: the network.
        optimizer: over its parameters.
        sedations: of different clusters; asleep or not.
        batches: inputs to compare on, each a tuple of arguments.
        tolerance: relative to the largest output.

    Raises:
        Conflict: the outputs differ or the smaller network fails, or nothing of a cluster would stay; nothing is changed, units that
            were asleep still are.
    """
    rows = list(batches)
    asleep = [sedation.asleep for sedation in sedations]
    for sedation in sedations:
        if len(sedation.units) >= sedation.cluster.units:
            raise Conflict(f"all {sedation.cluster.units} units of {sedation.cluster.name} would go")
    for sedation in sedations:
        sedation.attach()
    surgery = _Surgery(model, optimizer)
    try:
        expected = _outputs(model, rows)
        for sedation in sedations:
            sedation.detach()
        for path, dims in _gone(sedations).items():
            surgery.shrink(path, dims)
        difference, scale = _compared(expected, _outputs(model, rows))
        if not difference <= tolerance * scale:
            raise Conflict(
                f"without the units, outputs differ by {difference:.3g} from those with the units silenced, "
                f"more than {tolerance * scale:.3g}",
                hint="something in the network reads them in a way that could not be traced",
            )
    except Exception as problem:
        surgery.undo()
        for sedation, was in zip(sedations, asleep, strict=True):
            (sedation.attach if was else sedation.detach)()
        if isinstance(problem, Conflict):
            raise
        raise Conflict(f"without the units the network fails: {_words(problem)}") from problem
    return Removed(difference, scale, surgery.freed)


def rehearse(model: nn.Module, inputs: tuple[Any, ...], cluster: Cluster) -> str:
    """Why a unit of the cluster cannot be taken out, tried with its first one; empty when it can. The model is not changed."""
    if cluster.units < 2:
        return "it has one unit only"
    sedation = Sedation(model, cluster, [0])
    surgery = _Surgery(model, None)
    try:
        sedation.attach()
        expected = _outputs(model, [inputs])
        sedation.detach()
        for path, dims in _gone([sedation]).items():
            surgery.shrink(path, dims)
        difference, scale = _compared(expected, _outputs(model, [inputs]))
    except Exception as problem:  # noqa: BLE001 - a network that lost a unit may fail in any way
        return f"without a unit the network fails: {_words(problem)}"
    finally:
        sedation.detach()
        surgery.undo()
    return "" if difference <= TOLERANCE * scale else "something mixes its units before they are read"


def _gone(sedations: Sequence[Sedation]) -> Mapping[str, Mapping[tuple[str, int], set[int]]]:
    """Places that go, by module, tensor and dimension."""
    gone: dict[str, dict[tuple[str, int], set[int]]] = {}
    for sedation in sedations:
        for part in sedation.cluster.parts:
            module = sedation.module(part)
            for key in cut(part, module):
                gone.setdefault(part.path, {}).setdefault(key, set()).update(part.of(sedation.units))
    return gone


class _Surgery:
    """Shrinks tensors, and can put every one of them back."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        self.model, self.optimizer = model, optimizer
        self.freed = 0
        self._before: list[tuple[nn.Module, str, Tensor]] = []
        self._groups = [list(group["params"]) for group in optimizer.param_groups] if optimizer else []
        self._memory: dict[nn.Parameter, Any] = {}
        self._new: list[nn.Parameter] = []

    def shrink(self, path: str, dims: Mapping[tuple[str, int], set[int]]) -> None:
        """Cut places out of a module's tensors."""
        module = self.model.get_submodule(path)
        for (name, dim), places in dims.items():
            old = cast(Tensor, getattr(module, name))
            stays = torch.tensor([i for i in range(old.shape[dim]) if i not in places], device=old.device)
            self._before.append((module, name, old))
            if isinstance(old, nn.Parameter):
                self._swap(module, name, old, dim, stays)
            else:
                setattr(module, name, old.index_select(dim, stays))
        set_widths(module)

    def undo(self) -> None:
        """Every module, group and memory as before, by the same tensors."""
        for module, name, old in reversed(self._before):
            setattr(module, name, old)
            set_widths(module)
        if self.optimizer is not None:
            for group, parameters in zip(self.optimizer.param_groups, self._groups, strict=True):
                group["params"] = parameters
            for old, memory in self._memory.items():
                self.optimizer.state[old] = memory
            for new in self._new:
                self.optimizer.state.pop(new, None)
        self._before, self.freed = [], 0

    def _swap(self, module: nn.Module, name: str, old: nn.Parameter, dim: int, stays: Tensor) -> None:
        new = nn.Parameter(old.detach().index_select(dim, stays), requires_grad=old.requires_grad)
        setattr(module, name, new)
        self._new.append(new)
        self.freed += old.numel() - new.numel()
        if self.optimizer is None:
            return
        for group in self.optimizer.param_groups:
            group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
        if old not in self.optimizer.state:
            return
        memory = self.optimizer.state.pop(old)
        self._memory[old] = memory
        self.optimizer.state[new] = {
            key: value.index_select(dim, stays) if isinstance(value, Tensor) and value.shape == old.shape else value
            for key, value in memory.items()
        }


def set_widths(module: nn.Module) -> None:
    """Let a layer's or norm's own figures say what its tensors say."""
    if isinstance(module, Norm):
        held = module.weight if module.weight is not None else module.running_mean
        if held is not None:
            module.num_features = len(held)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Layer):
        module.out_channels, module.in_channels = module.weight.shape[:2]


@torch.no_grad()
def _outputs(model: nn.Module, batches: Iterable[tuple[Any, ...]]) -> list[Tensor]:
    """Output tensors in evaluation mode; every module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with undisturbed():
            leaves = [leaf for inputs in batches for leaf in tree_leaves(model(*inputs))]
    finally:
        for module, training in modes:
            module.training = training
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _compared(expected: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[float, float]:
    """(largest absolute difference, largest absolute output); infinite where they cannot be compared."""
    if [leaf.shape for leaf in expected] != [leaf.shape for leaf in found] or not expected:
        return torch.inf, 0.0
    differences = [(a.double() - b.double()).abs().max() for a, b in zip(expected, found, strict=True)]
    worst = float(torch.stack(differences).max().nan_to_num(torch.inf))
    return worst, max(float(leaf.double().abs().max()) for leaf in expected)


def _words(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]
