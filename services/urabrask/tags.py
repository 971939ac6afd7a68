"""Tags: what selection may ask for, derived from a kernel's papers and what was measured. Pure.

Latency is relative where it can be: among ``ENOUGH`` kernels or more measured on the same kind of machine, the fastest
third is low and the slowest third high; before that, fixed bounds decide.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from esper_core.blueprint import widening
from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.record import Measurement

TIERS = ("low", "medium", "high")
ENOUGH = 20
LATENCY_SECONDS_PER_ROW = (1e-5, 1e-4)
MEMORY_BYTES = (16 << 20, 256 << 20)
PARAMETERS = (10_000, 1_000_000)
DRIFT = (1e-5, 1e-3)


def tags_for(manifest: KernelManifest, measurement: Measurement, population: Sequence[float]) -> list[str]:
    """Sorted tags.

    Args:
        population: forward seconds per row of the kernels measured on the same kind of machine, ascending.
    """
    units = widening.units(manifest.blueprint, manifest.interface, manifest.symbols)
    seconds = measurement.forward_seconds / measurement.batch
    found = [
        f"layout:{manifest.interface.layout.name.lower()}",
        f"latency:{_tier(seconds, thirds(population) or LATENCY_SECONDS_PER_ROW)}",
        f"memory:{_tier(measurement.peak_memory_bytes, MEMORY_BYTES)}",
        f"parameters:{_tier(manifest.parameters, PARAMETERS)}",
        f"drift:{_tier(measurement.precision_drift, DRIFT)}",
    ]
    if units:
        found.append("foldable")
    if "width" in manifest.symbols:
        found.append(f"width:{manifest.symbols['width']}")
    return sorted(found)


def thirds(population: Sequence[float]) -> tuple[float, float] | None:
    """Upper bounds of the lowest and of the middle third; None while the population is too small."""
    if len(population) < ENOUGH:
        return None
    return population[len(population) // 3 - 1], population[2 * len(population) // 3 - 1]


def _tier(value: float, bounds: tuple[float, float]) -> str:
    return TIERS[bisect.bisect_left(bounds, value)]
