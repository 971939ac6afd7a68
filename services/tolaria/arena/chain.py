"""A chain of linear layers as the package gromo keeps it, grown by its TINY (Verbockhaven et al., 2024).

Needs gromo. Knows neither tasks nor rows, and trains nothing.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import cast

from gromo.containers.sequential_growing_container import SequentialGrowingModel
from gromo.modules.linear_growing_module import LinearGrowingModule
from gromo.utils.utils import line_search
from torch import Tensor, nn

from esper_core.nn.probe import Batch, LossFunction, mean_loss_of
from services.tolaria.arena.links import Link

_SINGULAR = "Using the pseudo-inverse for the computation of the optimal delta"
"""gromo says so where inputs of a layer are linearly dependent, as those from dead units are, and does what is right."""


class Chain(SequentialGrowingModel):
    """The same outputs as the links' own network.

    Args:
        entry: what comes before the first link.
        links: one or more, in order; they are copied.
        places: slots that may grow, ``source:sink`` by path; those that are not between neighbouring links are left out.
    """

    def __init__(self, entry: nn.Module, links: Sequence[Link], places: Collection[str]) -> None:
        first, last = links[0].linear, links[-1].linear
        super().__init__(first.in_features, last.out_features, first.weight.device)
        self.entry = entry
        self.by_path: dict[str, LinearGrowingModule] = {}
        before: LinearGrowingModule | None = None
        for link in links:
            self.by_path[link.path] = before = _growing(link, before)
        self.layers = nn.ModuleList(self.by_path.values())
        pairs = {f"{one}:{two}": (self.by_path[one], self.by_path[two]) for one, two in pairwise(self.by_path)}
        self.slots = {slot: pair for slot, pair in pairs.items() if slot in places}
        self._growable_layers = [sink for _, sink in self.slots.values()]
        self.set_growing_layers("all")

    def forward(self, x: Tensor) -> Tensor:
        """The outputs."""
        x = self.entry(x)
        for layer in self.layers:
            x = layer(x)
        return x

    def extended_forward(self, x: Tensor, mask: object = None) -> Tensor:  # type: ignore[override]  # noqa: ARG002
        """The outputs with the units that are about to be added, at the present scaling factor."""
        x, beside = self.entry(x), None
        for layer in self.by_path.values():
            x, beside = layer.extended_forward(x, beside)
        return x

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Weight shapes by path."""
        return {path: tuple(layer.weight.shape) for path, layer in self.by_path.items()}

    def choose(
        self, probe: Sequence[Batch], loss_fn: LossFunction, units: int, budget: int | None = None
    ) -> str | None:
        """The slot of highest first-order improvement; its best new units wait there for ``insert``.

        As gromo says of TINY, weights that are there already stay as they are, and new units do what these could not.

        Args:
            units: that are added at most.
            budget: parameters that are added at most; None = no limit.

        Returns:
            None when the budget does not pay for one unit anywhere.
        """
        room = {slot: units if budget is None else min(units, budget // self._cost(slot)) for slot in self.slots}
        open_slots = [slot for slot in room if room[slot]]
        if not open_slots:
            return None
        self._growing_layers = [self.slots[slot][1] for slot in open_slots]
        self._study(probe, loss_fn)
        for slot in open_slots:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", _SINGULAR, UserWarning)
                self.slots[slot][1].compute_optimal_updates(maximum_added_neurons=room[slot], compute_delta=False)
        for layer in self.by_path.values():
            layer.reset_computation()
        return open_slots[self.select_best_update()]

    def insert(self, probe: Sequence[Batch], loss_fn: LossFunction) -> bool:
        """Add the units that wait, scaled as lowers the probe's loss most; the two layers have new parameters afterwards.

        Returns:
            Whether any scale lowered the loss; otherwise nothing is added.
        """
        factor = float(cast(float, line_search(lambda factor: self._loss_at(factor, probe, loss_fn))[0]))
        if factor == 0:
            for layer in self.by_path.values():
                layer.delete_update()
            return False
        self.set_scaling_factor(factor)
        self.apply_change()
        return True

    def _study(self, probe: Sequence[Batch], loss_fn: LossFunction) -> None:
        """Take gromo's statistics in one pass over the probe; it wants the gradients of summed losses."""
        self.eval()
        self.init_computation()
        for inputs, targets in probe:
            self.zero_grad()
            (loss_fn(self(inputs), targets) * len(targets)).backward()  # type: ignore[no-untyped-call]
            self.update_computation()

    def _cost(self, slot: str) -> int:
        """Parameters of one unit there."""
        source, sink = self.slots[slot]
        return source.in_features + int(source.use_bias) + sink.out_features

    def _loss_at(self, factor: float, probe: Sequence[Batch], loss_fn: LossFunction) -> float:
        """Mean loss on the probe with the new units at that scale; infinite rather than not a number."""
        self.set_scaling_factor(float(factor))
        loss = mean_loss_of(self.extended_forward, probe, loss_fn)
        return loss if math.isfinite(loss) else math.inf


def _growing(link: Link, before: LinearGrowingModule | None) -> LinearGrowingModule:
    linear, activation = link.linear, copy.deepcopy(link.activation)
    if isinstance(activation, nn.ReLU | nn.SELU | nn.SiLU):
        activation.inplace = False  # gromo looks at what went in, afterwards
    layer = LinearGrowingModule(
        linear.in_features,
        linear.out_features,
        use_bias=linear.bias is not None,
        post_layer_function=activation,
        previous_module=before,
        device=linear.weight.device,
        name=link.path,
    )
    layer.layer.load_state_dict(linear.state_dict())
    return layer
