"""Units on trial: silenced, watched, and in the end gone or awake again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from esper_core.control.carve.papers import Cut
from esper_core.errors import Conflict, InvalidInput, NotFound, nearest
from esper_core.nn.carve.anatomy import Anatomy, Cluster
from esper_core.nn.carve.importance import KERNEL
from esper_core.nn.carve.removal import Removed, remove
from esper_core.nn.carve.sedation import Kept, Sedation
from esper_core.nn.host import Host, Slot
from esper_core.nn.widen import forget


@dataclass(frozen=True)
class Standards:
    """How the network did before.

    Attributes:
        loss, accuracy: held-back; no accuracy for a regression.
    """

    loss: float
    accuracy: float | None

    def better_than(self, other: Standards) -> bool:
        """By accuracy, or by loss where there is none."""
        if self.accuracy is not None and other.accuracy is not None:
            return self.accuracy > other.accuracy
        return self.loss < other.loss

    def failed_by(self, now: Standards, drop: float, rise: float) -> str:
        """How ``now`` is worse than may be; empty when it is not. What is not finite is worse."""
        if self.accuracy is not None and now.accuracy is not None:
            if now.accuracy < self.accuracy - drop:
                return f"accuracy fell from {self.accuracy:.4f} to {now.accuracy:.4f}, more than {drop:g}"
        elif not now.loss <= self.loss * (1 + rise):
            return f"held-back loss rose from {self.loss:.4g} to {now.loss:.4g}, more than {rise:.0%}"
        return ""


class Ward:
    """The units of one trial in a network: puts them to sleep, wakes them, takes them out.

    Args:
        host: the network.
        optimizer: over its parameters.
        anatomy: of the network as it stands.
        cuts: which units.

    Raises:
        NotFound: no cluster or kernel is called so.
        InvalidInput: a unit does not exist, or nothing of its cluster would stay.
        Conflict: the cluster has an obstacle.
    """

    def __init__(
        self, host: Host, optimizer: torch.optim.Optimizer | None, anatomy: Anatomy, cuts: Sequence[Cut]
    ) -> None:
        self.host, self.optimizer, self.cuts = host, optimizer, tuple(cuts)
        self.sedations: list[Sedation] = []
        self.kernels: list[Slot] = []
        for cut in cuts:
            if cut.cluster.startswith(KERNEL):
                self.kernels.append(_fossil(host, cut))
            else:
                self.sedations.append(Sedation(host.model, _checked(anatomy, cut), cut.units))

    def silence(self, silent: bool) -> None:
        """Let the network run without the units, or with them again."""
        for sedation in self.sedations:
            (sedation.attach if silent else sedation.detach)()
        for slot in self.kernels:
            if slot.graft is not None:
                slot.graft.muted = silent

    def keep(self) -> dict[str, dict[str, Kept]]:
        """The units' numbers as they are, by cluster. A kernel's own weights stand still while it is silent, but for momentum."""
        return {sedation.cluster.name: sedation.keep(self.optimizer) for sedation in self.sedations}

    def wake(self, kept: Mapping[str, Mapping[str, Kept]]) -> None:
        """Everything is read again, and the units are as they were when they fell asleep."""
        self.silence(False)
        for sedation in self.sedations:
            sedation.put_back(kept[sedation.cluster.name], self.optimizer)

    def remove(self, batches: Iterable[tuple[Any, ...]]) -> Removed:
        """Take everything out for good.

        Raises:
            Conflict: see ``esper_core.nn.carve.removal.remove``; nothing is changed.
        """
        removed = remove(self.host.model, self.optimizer, self.sedations, batches)
        freed = removed.parameters
        for slot in self.kernels:
            if slot.graft is not None:
                parameters = list(slot.graft.kernel.parameters())
                if self.optimizer is not None:
                    forget(self.optimizer, parameters)
                slot.release()
                freed += sum(parameter.numel() for parameter in parameters)
        return Removed(removed.difference, removed.scale, freed)


@dataclass
class Trial:
    """One plan under way.

    Attributes:
        plan_id, order_id: what it follows.
        ward: the units.
        epoch: when they were silenced.
        before: how the network did then.
        expected, upper: what was expected of the loss, by the estimate and by the counterfactual's bound.
        kept: the units' numbers as they were, by cluster.
    """

    plan_id: str
    order_id: str
    ward: Ward
    epoch: int
    before: Standards
    expected: float
    upper: float
    kept: dict[str, dict[str, Kept]] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs, the network apart."""
        return {
            "plan_id": self.plan_id,
            "order_id": self.order_id,
            "cuts": [cut.model_dump(mode="json") for cut in self.ward.cuts],
            "epoch": self.epoch,
            "before": [self.before.loss, self.before.accuracy],
            "expected": self.expected,
            "upper": self.upper,
            "kept": self.kept,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], ward_of: Callable[[Sequence[Cut]], Ward]) -> Trial:
        """The same trial, its units silenced."""
        ward = ward_of([Cut.model_validate(cut) for cut in state["cuts"]])
        ward.silence(True)
        rest = {name: value for name, value in state.items() if name != "cuts"}
        return cls(**{**rest, "ward": ward, "before": Standards(*state["before"])})


def fossils_beside(host: Host) -> list[Slot]:
    """Slots whose kernel runs beside the host."""
    return [slot for slot in host.slots.values() if slot.graft is not None and slot.graft.attached]


def hindered(host: Host, cluster: Cluster) -> str:
    """Why a cluster must keep its width although it could be cut: somebody beside the host relies on it; empty when nobody does."""
    for slot in host.slots.values():
        if slot.layers is None:
            ends = (slot.source_path, slot.sink_path)
            if any(path == end or path.startswith(f"{end}.") for path in cluster.paths for end in ends):
                return f"slot {slot.name} lies between blocks, and its width is fixed"
        elif slot.graft is not None and cluster.paths & {slot.source_path, slot.norm_path, slot.sink_path}:
            return f"the kernel at {slot.name} relies on its width"
    return ""


def halved(cuts: Sequence[Cut], importance: Callable[[str, int], float]) -> tuple[Cut, ...]:
    """The less important half of the units; empty when there was one."""
    ranked = sorted((importance(cut.cluster, unit), cut.cluster, unit) for cut in cuts for unit in cut.units)
    kept: dict[str, list[int]] = {}
    for _, name, unit in ranked[: len(ranked) // 2]:
        kept.setdefault(name, []).append(unit)
    return tuple(Cut(cluster=name, units=tuple(sorted(units))) for name, units in sorted(kept.items()))


def _checked(anatomy: Anatomy, cut: Cut) -> Cluster:
    cluster = anatomy.clusters.get(cut.cluster)
    if cluster is None:
        raise NotFound(f"no units stand at {cut.cluster!r}", hint=nearest(cut.cluster, anatomy.clusters))
    if cluster.obstacle:
        raise Conflict(f"{cut.cluster} cannot be carved: {cluster.obstacle}")
    if not all(0 <= unit < cluster.units for unit in cut.units) or len(set(cut.units)) != len(cut.units):
        raise InvalidInput(f"{cut.cluster} has units 0 to {cluster.units - 1}", hint="measure again: it has changed")
    if len(cut.units) >= cluster.units:
        raise InvalidInput(f"all {cluster.units} units of {cut.cluster} would go", hint="leave one at least")
    return cluster


def _fossil(host: Host, cut: Cut) -> Slot:
    name = cut.cluster.removeprefix(KERNEL)
    slot = host.slots.get(name)
    if slot is None or slot.graft is None or not slot.graft.attached or cut.units != (0,):
        known = (KERNEL + slot.name for slot in fossils_beside(host))
        raise NotFound(f"there is no {cut.cluster!r} beside the network", hint=nearest(cut.cluster, known))
    return slot
