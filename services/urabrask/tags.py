"""Tags: what selection may ask for, derived from a kernel's papers and what was measured. Pure.

Latency, memory and parameters are relative where they can be: among ``ENOUGH`` kernels or more measured on the same kind
of machine, the lowest third is low and the highest third high; before that, fixed bounds decide. As the population
grows the bounds move, and with them the tags of kernels that were judged long ago: see ``services.urabrask.retag``.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from esper_core.blueprint import widening
from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.record import Measurement

TIERS = ("low", "medium", "high")
ENOUGH = 20
"""Kernels of one kind of machine from which on thirds of them are the tiers."""
DRIFT = (1e-5, 1e-3)
RISK = (1 / 3, 2 / 3)


@dataclass(frozen=True)
class Figures:
    """What tiers are cut from; the names are those of the tags."""

    latency: float
    """Median forward seconds per row."""
    memory: float
    """Peak bytes per row of the measured batch."""
    parameters: float
    """Trainable parameters."""

    @classmethod
    def of(cls, measurement: Measurement, parameters: int) -> Figures:
        return cls(
            measurement.forward_seconds / measurement.batch,
            measurement.peak_memory_bytes / measurement.batch,
            parameters,
        )


RELATIVE = tuple(field.name for field in fields(Figures))
Bounds = Mapping[str, tuple[float, float]]
"""By figure: the largest that is still low, and the largest that is still medium."""
FIXED: Bounds = {"latency": (1e-5, 1e-4), "memory": (256 << 10, 4 << 20), "parameters": (10_000, 1_000_000)}
"""While there are too few kernels to compare with."""


def bounds(population: Sequence[Figures]) -> Bounds:
    """Where the tiers end among ``population``, the kernels measured on one kind of machine."""
    if len(population) < ENOUGH:
        return FIXED
    return {name: _thirds(sorted(getattr(figures, name) for figures in population)) for name in RELATIVE}


def tags_for(manifest: KernelManifest, measurement: Measurement, limits: Bounds, risk: float) -> list[str]:
    """Sorted tags of a kernel.

    Args:
        limits: of the kernels measured on the same kind of machine, see ``bounds``.
        risk: 0 to 1.
    """
    units = widening.units(manifest.blueprint, manifest.interface, manifest.symbols)
    found = [
        f"layout:{manifest.interface.layout.name.lower()}",
        f"drift:{_tier(measurement.precision_drift, DRIFT)}",
        *_relative(Figures.of(measurement, manifest.parameters), limits, risk),
    ]
    if units:
        found.append("foldable")
    if "width" in manifest.symbols:
        found.append(f"width:{manifest.symbols['width']}")
    return sorted(found)


def retagged(tags: Sequence[str], figures: Figures, limits: Bounds, risk: float) -> list[str]:
    """``tags`` with the relative ones, and risk, as they are by now; sorted. The others say nothing that could change."""
    stale = tuple(f"{name}:" for name in (*RELATIVE, "risk"))
    return sorted([*(tag for tag in tags if not tag.startswith(stale)), *_relative(figures, limits, risk)])


def _relative(figures: Figures, limits: Bounds, risk: float) -> list[str]:
    found = [f"{name}:{_tier(getattr(figures, name), limits[name])}" for name in RELATIVE]
    return [*found, f"risk:{_tier(risk, RISK)}"]


def _thirds(values: Sequence[float]) -> tuple[float, float]:
    """The last of the lowest third and of the middle third of ascending ``values``."""
    return values[len(values) // 3 - 1], values[2 * len(values) // 3 - 1]


def _tier(value: float, limits: tuple[float, float]) -> str:
    return TIERS[bisect.bisect_left(limits, value)]
