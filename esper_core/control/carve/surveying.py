"""Looking at a network's units: its anatomy, what they are worth, and what that leaves room for."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch

from esper_core.control.carve.fossils import Fossils
from esper_core.control.carve.papers import CarveSurvey, Cut, Standing
from esper_core.control.carve.settings import CarveSettings
from esper_core.control.carve.trial import Standards, fossils_beside, hindered
from esper_core.errors import Unsupported
from esper_core.nn.carve.anatomy import Anatomy, Cluster, dissect
from esper_core.nn.carve.importance import KERNEL, Worth, weigh
from esper_core.nn.host import Host
from esper_core.nn.probe import Batch, LossFunction, each_tensor, run

EXAMPLE_ROWS = 2
COMPARED_ROWS = 256
"""Held-back rows on which a removal is compared with what it replaces."""
CANDIDATES = 2048
"""Units that a survey names, the least worthy ones of the network."""


class Worths:
    """What every unit is worth, by cluster and number."""

    def __init__(self, worths: Mapping[str, Worth]) -> None:
        self.by_cluster = worths

    def importance(self, cluster: str, unit: int) -> float:
        """Of one unit; see ``Worth``."""
        return self.by_cluster[cluster].importance[unit]

    def change(self, cuts: Sequence[Cut]) -> float:
        """Expected of the loss without some units."""
        return sum(self.by_cluster[cut.cluster].change[unit] for cut in cuts for unit in cut.units)


class Eye:
    """Sees a host's units.

    Args:
        host: the network.
        loss_fn: (outputs, targets) → mean loss over the batch.
        probe: training batches.
        settings: constants.
        run_id: named in surveys.

    Attributes:
        barred: clusters that turned out not to be removable, with reasons.
        worths: what the last look found.
        obstacle: why nothing could be found; empty when something was.
    """

    def __init__(
        self, host: Host, loss_fn: LossFunction, probe: Sequence[Batch], settings: CarveSettings, run_id: str
    ) -> None:
        self.host, self.loss_fn, self.probe = host, loss_fn, probe
        self.settings, self.run_id = settings, run_id
        self.barred: dict[str, str] = {}
        self.worths = Worths({})
        self.obstacle = ""
        self._anatomy: Anatomy | None = None

    @property
    def parameters(self) -> int:
        """Of the host and of the kernels beside it."""
        beside = (slot.graft.kernel for slot in fossils_beside(self.host) if slot.graft is not None)
        return self.host.parameter_count + sum(p.numel() for kernel in beside for p in kernel.parameters())

    def anatomy(self, fresh: bool = False) -> Anatomy:
        """The host's clusters, obstacles beside the host included.

        Args:
            fresh: look again, since the host may have changed.

        Raises:
            Unsupported: the network cannot be traced.
        """
        if self._anatomy is None or fresh:
            inputs, _ = self.probe[0]
            example = each_tensor(inputs, itemgetter(slice(EXAMPLE_ROWS)))
            found = dissect(self.host.model, example if isinstance(example, tuple) else (example,))
            self._anatomy = replace(
                found, clusters={name: self._with_obstacle(cluster) for name, cluster in found.clusters.items()}
            )
        return self._anatomy

    def forget(self) -> None:
        """What was seen is no longer so."""
        self._anatomy, self.worths = None, Worths({})

    def look(self) -> None:
        """Measure what every unit is worth now, kernels beside the host included. A network that cannot be traced has none."""
        try:
            anatomy, self.obstacle = self.anatomy(fresh=True), ""
        except Unsupported as problem:
            self._anatomy = anatomy = Anatomy({}, self.host.parameter_count, 0)
            self.obstacle = problem.message
        self.worths = Worths(weigh(self.host, anatomy, self.probe, self.loss_fn))

    def cost(self, cuts: Sequence[Cut]) -> int:
        """Parameters that cuts free; where two clusters cross, what lies on the crossing counts twice."""
        clusters = self.anatomy().clusters
        kernels = {KERNEL + slot.name: slot.graft for slot in fossils_beside(self.host)}
        total = 0
        for cut in cuts:
            graft = kernels.get(cut.cluster)
            if graft is not None:
                total += sum(parameter.numel() for parameter in graft.kernel.parameters())
            else:
                total += clusters[cut.cluster].unit_parameters * len(cut.units)
        return total

    def survey(self, epoch: int, now: Standards, room: float, left: int, fossils: Fossils) -> CarveSurvey:
        """What the last look has shown.

        Args:
            now: how the host does.
            room: loss that a plan may cost.
            left: parameters that may still be freed in this run.
        """
        parameters = self.parameters
        anatomy = self.anatomy()
        obstacle = self.obstacle or ("" if left else "the budget of this run is used up")
        standings = [_standing(cluster, fossils) for cluster in anatomy.clusters.values()]
        standings += [
            Standing(
                cluster=KERNEL + slot.name,
                units=1,
                least=0,
                grown=1,
                unit_parameters=sum(parameter.numel() for parameter in slot.graft.kernel.parameters()),
            )
            for slot in fossils_beside(self.host)
            if slot.graft is not None
        ]
        return CarveSurvey(
            run_id=self.run_id,
            epoch=epoch,
            loss=now.loss,
            accuracy=now.accuracy,
            parameters=parameters,
            flops=anatomy.flops,
            room_parameters=min(left, int(self.settings.plan_share * parameters)),
            room_loss=room,
            room_share=self.settings.cluster_share,
            autonomous=self.settings.autonomous,
            obstacle=obstacle,
            clusters=tuple(_with_candidates(standings, self.worths.by_cluster)),
        )

    def rows(self, validation: Sequence[Batch]) -> Iterable[tuple[Any, ...]]:
        """Inputs of ``COMPARED_ROWS`` held-back rows or a little more."""
        seen = 0
        for inputs, targets in validation:
            if seen < COMPARED_ROWS:
                seen += len(targets)
                yield inputs if isinstance(inputs, tuple) else (inputs,)

    def _with_obstacle(self, cluster: Cluster) -> Cluster:
        why = cluster.obstacle or self.barred.get(cluster.name, "") or hindered(self.host, cluster)
        return replace(cluster, obstacle=why)


@torch.no_grad()
def held_back(host: Host, batches: Sequence[Batch], loss_fn: LossFunction) -> Standards:
    """How a host does on held-back batches, in evaluation mode; accuracy where targets are class numbers."""
    total, right, count, classes = 0.0, 0, 0, True
    with host.evaluating():
        for inputs, targets in batches:
            outputs = run(host, inputs)
            total += float(loss_fn(outputs, targets)) * len(targets)
            count += len(targets)
            classes = classes and targets.dtype == torch.int64 and targets.ndim == 1 and outputs.ndim == 2
            if classes:
                right += int((outputs.argmax(1) == targets).sum())
    return Standards(total / count, right / count if classes else None)


def _standing(cluster: Cluster, fossils: Fossils) -> Standing:
    return Standing(
        cluster=cluster.name,
        units=cluster.units,
        grown=len(fossils.of(cluster)),
        unit_parameters=cluster.unit_parameters,
        unit_flops=cluster.unit_flops,
        obstacle=cluster.obstacle[:300],
    )


def _with_candidates(standings: Sequence[Standing], worths: Mapping[str, Worth]) -> list[Standing]:
    """The standings with the network's least worthy units per parameter named."""
    ranked = heapq.nsmallest(
        CANDIDATES,
        (
            (importance / max(standing.unit_parameters, 1), standing.cluster, unit)
            for standing in standings
            if standing.cluster in worths
            for unit, importance in enumerate(worths[standing.cluster].importance)
        ),
    )
    chosen: dict[str, list[int]] = {}
    for _, name, unit in ranked:
        chosen.setdefault(name, []).append(unit)
    return [
        standing.model_copy(
            update={
                "candidates": tuple(units),
                "importance": tuple(worths[standing.cluster].importance[unit] for unit in units),
                "change": tuple(worths[standing.cluster].change[unit] for unit in units),
            }
        )
        if (units := chosen.get(standing.cluster))
        else standing
        for standing in standings
    ]
