"""Compiled code that a resumed run had and waits for: a checkpoint holds data only, so the code comes from its source again.

Until it is there, the kernel computes eagerly, which is counted. A run that has it back before its first step equals one that
was never interrupted; one that has it later equals it up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping

from esper_core.control.plot import Plot
from esper_core.control.roles import KernelSource
from esper_core.control.seed import Seed
from esper_core.errors import EsperError
from esper_core.nn.native import expect


class Awaited:
    """Which slots of a run wait.

    Args:
        plot: where the kernels are.
        source: where they came from.
    """

    def __init__(self, plot: Plot, source: KernelSource) -> None:
        self._plot, self._source = plot, source
        self._seeds: dict[str, str] = {}

    def expect(self, seeds: Mapping[str, Seed]) -> None:
        """From now on wait for what these seeds, just read from a checkpoint, had."""
        slots = self._plot.host.slots
        self._seeds = {
            name: seed.seed_id for name, seed in seeds.items() if seed.native and slots[name].graft is not None
        }
        for name in self._seeds:
            expect(self._plot.kernel(slots[name]), seeds[name].passes)

    def look(self, seeds: Mapping[str, Seed]) -> None:
        """Take what has come, and note what never will."""
        for name, seed_id in list(self._seeds.items()):
            seed, slot = seeds[name], self._plot.host.slots[name]
            if seed.seed_id != seed_id or slot.graft is None:
                del self._seeds[name]
                continue
            try:
                kernel = self._source.poll(seed.kernel_id)
            except EsperError as problem:
                seed.native, seed.eager = False, problem.message
                del self._seeds[name]
                continue
            if kernel is not None:
                self._plot.quicken(slot, kernel, seed)
                del self._seeds[name]
