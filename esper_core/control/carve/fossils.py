"""Which units of a network growing added, as far as can be seen: folding widens a layer at its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from esper_core.nn.carve.anatomy import Cluster, widths


class Fossils:
    """The grown units of every layer.

    Args:
        model: as it is before it grows.
    """

    def __init__(self, model: nn.Module) -> None:
        self._widths = widths(model)
        self._units: dict[str, set[int]] = {}

    def look(self, model: nn.Module) -> None:
        """Take in what has become wider, or narrower again, since the last look."""
        for path, width in widths(model).items():
            before = self._widths.get(path, width)
            kept = {unit for unit in self._units.get(path, ()) if unit < width}
            self._units[path] = kept | set(range(before, width))
            self._widths[path] = width

    def of(self, cluster: Cluster) -> frozenset[int]:
        """Numbers, in the cluster, of the units that growing added."""
        return frozenset(
            unit
            for part in cluster.parts
            if part.role == "writes"
            for place, unit in zip(part.places, part.units, strict=True)
            if place in self._units.get(part.path, ())
        )

    def removed(self, cluster: Cluster, units: frozenset[int]) -> None:
        """Count anew after units of a cluster have gone."""
        for part in cluster.parts:
            if part.role == "writes":
                gone = set(part.of(units))
                stay = [place for place in range(self._widths[part.path]) if place not in gone]
                grown = self._units.get(part.path, set())
                self._units[part.path] = {new for new, old in enumerate(stay) if old in grown}
                self._widths[part.path] = len(stay)

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs."""
        return {"widths": dict(self._widths), "units": {path: sorted(units) for path, units in self._units.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self._widths = dict(state["widths"])
        self._units = {path: set(units) for path, units in state["units"].items()}
