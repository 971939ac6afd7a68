"""Which units of a network must go together: a row here, a norm's channel there, a column wherever their output is read.

Dependencies are traced by torch-pruning (G. Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023). What it finds is not
believed but tried: it takes softmax or a mean over units for elementwise, and a flattening after a permutation for one in channel
order. Every cluster therefore loses one unit on trial, and where the network then differs from the one whose unit is merely silenced,
or fails, the cluster has an obstacle and nobody carves it.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch_pruning
from torch import nn
from torch_pruning.dependency import Group

from esper_core.errors import InvalidInput, Unsupported
from esper_core.nn.chance import undisturbed
from esper_core.nn.export.plain import grafts
from esper_core.nn.operations import visited

Layer = nn.Linear | nn.Conv2d
Norm = nn.BatchNorm1d | nn.BatchNorm2d
Role = Literal["writes", "reads", "norm"]


@dataclass(frozen=True)
class Part:
    """What one module has to do with a cluster's units.

    Attributes:
        path: of the module.
        role: ``writes`` the units (rows), ``reads`` them (columns), or scales each (``norm``).
        places: rows, columns or channels of the module, one or more per unit.
        units: which unit each of them belongs to.
    """

    path: str
    role: Role
    places: tuple[int, ...]
    units: tuple[int, ...]

    def of(self, chosen: frozenset[int]) -> list[int]:
        """Places that belong to the chosen units."""
        return [place for place, unit in zip(self.places, self.units, strict=True) if unit in chosen]


@dataclass(frozen=True)
class Cluster:
    """Units that are numbered alike wherever they appear, so that one of them can only leave everywhere at once.

    Attributes:
        name: path of the first layer that writes them.
        units: how many.
        parts: every module they appear in.
        unit_parameters: what one of them costs.
        unit_flops: floating-point operations (two per multiply-add) of one of them, forward, per sample; linear and convolutional
            layers only.
        obstacle: why none of them can be taken out; empty when they can.
    """

    name: str
    units: int
    parts: tuple[Part, ...]
    unit_parameters: int
    unit_flops: int
    obstacle: str = ""

    @property
    def readers(self) -> tuple[Part, ...]:
        """Where their output is read."""
        return tuple(part for part in self.parts if part.role == "reads")

    @property
    def paths(self) -> frozenset[str]:
        """Every module they appear in."""
        return frozenset(part.path for part in self.parts)


@dataclass(frozen=True)
class Anatomy:
    """A network's clusters by name, and what the whole costs.

    Attributes:
        clusters: in the order in which their first layers are registered.
        parameters: of the network.
        flops: of its linear and convolutional layers, forward, per sample.
    """

    clusters: Mapping[str, Cluster]
    parameters: int
    flops: int


def dissect(model: nn.Module, inputs: tuple[Any, ...]) -> Anatomy:
    """Find the clusters of ``model``; the model is as before when this returns, hooks, modes and gradients included.

    Args:
        model: any module; kernels beside it are left out of account.
        inputs: one batch as in training; a few rows are enough.

    Raises:
        InvalidInput: the example does not fit.
        Unsupported: the network cannot be traced.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, Layer)}
    with _traceable(model):
        calls, positions = _observe(model, inputs, layers)
        graph = _graph(model, inputs)
        costs = {path: 2 * positions[path] for path in layers if path in positions}
        found: dict[str, Cluster] = {}
        taken: set[str] = set()
        for path, layer in layers.items():
            if path in taken or path not in costs:
                continue
            cluster = _cluster(model, graph, path, layer, calls, costs)
            found[path] = cluster
            taken |= {part.path for part in cluster.parts if part.role == "writes"}
    flops = sum(costs[path] * layers[path].weight.numel() for path in costs)
    tried = {name: _tried(model, inputs, cluster) for name, cluster in found.items()}
    return Anatomy(tried, sum(parameter.numel() for parameter in model.parameters()), flops)


def widths(model: nn.Module) -> dict[str, int]:
    """Units that every linear and convolutional layer writes, by path."""
    return {path: module.weight.shape[0] for path, module in model.named_modules() if isinstance(module, Layer)}


def _tried(model: nn.Module, inputs: tuple[Any, ...], cluster: Cluster) -> Cluster:
    from esper_core.nn.carve.removal import rehearse  # it needs clusters itself

    if cluster.obstacle:
        return cluster
    return replace(cluster, obstacle=rehearse(model, inputs, cluster))


@contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, every parameter wanting a gradient, kernels silent, random state kept; all put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    wanting = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    silent = [(graft, graft.muted) for graft in grafts(model)]
    model.eval()
    for parameter, _ in wanting:
        parameter.requires_grad_(parameter.is_floating_point())
    for graft, _ in silent:
        graft.muted = True
    try:
        with undisturbed(), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, wants in wanting:
            parameter.requires_grad_(wants)
        for graft, muted in silent:
            graft.muted = muted


def _observe(
    model: nn.Module, inputs: tuple[Any, ...], layers: Mapping[str, Layer]
) -> tuple[Counter[str], dict[str, int]]:
    """How often each layer runs in one forward pass, and at how many positions per sample."""
    try:
        with visited(layers) as shapes, torch.no_grad():
            model(*inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as problem:
        raise InvalidInput(
            f"the example inputs do not fit {type(model).__name__}: {problem}",
            hint="pass a batch shaped as in training",
        ) from problem
    calls = Counter({path: len(given) for path, given in shapes.items()})
    positions = {
        path: sum(shape[1:].numel() // len(layers[path].weight) for shape in given)
        for path, given in shapes.items()
        if given
    }
    return calls, positions


def _graph(model: nn.Module, inputs: tuple[Any, ...]) -> torch_pruning.DependencyGraph:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of parameters outside of layers: they become obstacles below
            graph = torch_pruning.DependencyGraph()  # type: ignore[no-untyped-call]
            return graph.build_dependency(model, example_inputs=inputs, verbose=False)
    except Exception as problem:
        raise Unsupported(
            f"{type(model).__name__} cannot be carved: {type(problem).__name__}: {problem}",
            hint="its units' dependencies could not be traced",
        ) from problem


def _cluster(
    model: nn.Module,
    graph: torch_pruning.DependencyGraph,
    path: str,
    layer: Layer,
    calls: Mapping[str, int],
    costs: Mapping[str, int],
) -> Cluster:
    """The cluster of the units that the layer at ``path`` writes."""
    units = layer.weight.shape[0]
    rows = (
        torch_pruning.prune_linear_out_channels
        if isinstance(layer, nn.Linear)
        else torch_pruning.prune_conv_out_channels
    )
    bare = Part(path, "writes", tuple(range(units)), tuple(range(units)))
    try:
        group = graph.get_pruning_group(layer, rows, idxs=list(range(units)))
        parts, obstacle = _parts(model, graph, group)
    except Exception as problem:  # noqa: BLE001 - as above; other layers may be understood
        return Cluster(path, units, (bare,), 0, 0, f"its dependencies cannot be traced: {problem}")
    modules = dict(model.named_modules())
    if not obstacle and any(unit is None for part in parts for unit in part.units):
        obstacle = "its units cannot be told apart where they are read"
    if not obstacle and not any(part.role == "reads" for part in parts):
        obstacle = "its output is the network's"
    again = [part.path for part in parts if calls.get(part.path, 1) != 1]
    if not obstacle and again:
        obstacle = f"{again[0]} runs more than once in a forward pass"
    if obstacle:
        return Cluster(path, units, tuple(parts) or (bare,), 0, 0, obstacle)
    return Cluster(path, units, tuple(parts), _parameters(modules, parts, units), _flops(modules, parts, units, costs))


def _parts(model: nn.Module, graph: torch_pruning.DependencyGraph, group: Group) -> tuple[list[Part], str]:
    """The modules of a group, and the first thing in it that cannot be cut unit by unit."""
    paths = {id(module): path for path, module in model.named_modules()}
    ends = [tuple(paths.get(id(end), "") for end in (graft.source, graft.sink)) for graft in grafts(model)]
    tied = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    parts: dict[tuple[str, Role], Part] = {}
    for number in range(len(group)):
        item = group[number]
        module, role = item.dep.target.module, cast(Role, "")
        if isinstance(module, nn.Parameter):
            return [*parts.values()], "a parameter outside of any layer has its units"
        path = paths.get(id(module))
        if path is None:  # an operation, not a module
            continue
        writes = graph.is_out_channel_pruning_fn(item.dep.handler)
        if type(module) in (nn.Linear, nn.Conv2d):
            role = "writes" if writes else "reads"
            if isinstance(module, nn.Conv2d) and module.groups != 1:
                return [*parts.values()], f"{path} is a grouped convolution"
        elif type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            role = "norm"
        elif any(True for _ in module.parameters()):
            return [*parts.values()], f"{path} is a {type(module).__name__}, which cannot be cut unit by unit"
        else:
            continue
        for source, sink in ends:
            if any(path == end or path.startswith(f"{end}.") for end in (source, sink)):
                return [*parts.values()], f"the kernel at {source}:{sink} relies on its width"
        if any(tied[id(parameter)] != 1 for parameter in module.parameters(recurse=False)):
            return [*parts.values()], f"{path} shares its parameters with another module"
        old = parts.get((path, role))
        merged = dict(zip(old.places, old.units, strict=True)) if old else {}
        merged |= dict(zip(item.idxs, item.root_idxs, strict=True))
        parts[path, role] = Part(path, role, tuple(merged), tuple(merged.values()))
    return [*parts.values()], ""


def _parameters(modules: Mapping[str, nn.Module], parts: Sequence[Part], units: int) -> int:
    """Parameters that one unit costs, all taken alone: where a layer both reads and writes the cluster, the crossing counts once."""
    total = 0
    for part in parts:
        module = cast(Any, modules[part.path])
        share = len(part.places) // units
        if part.role == "norm":
            total += share * sum(1 for _ in module.parameters())
        else:
            other = module.weight.shape[1 if part.role == "writes" else 0]
            kernel = module.weight[0, 0].numel()
            crossing = any(p.path == part.path and p.role != part.role for p in parts) and part.role == "reads"
            own = module.bias is not None and part.role == "writes"
            total += share * (kernel * (other - crossing) + own)
    return total


def _flops(modules: Mapping[str, nn.Module], parts: Sequence[Part], units: int, costs: Mapping[str, int]) -> int:
    total = 0
    for part in parts:
        if part.role == "norm":
            continue
        weight = cast(Layer, modules[part.path]).weight
        other = weight.shape[1 if part.role == "writes" else 0]
        total += len(part.places) // units * weight[0, 0].numel() * other * costs.get(part.path, 0)
    return total
