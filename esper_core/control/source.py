"""Kernels built in this process from the built-in catalogue: the whole of library mode's kernel plane."""

from __future__ import annotations

from collections.abc import Iterable

from esper_core.blueprint.analyse import analyse
from esper_core.blueprint.build import build
from esper_core.blueprint.catalogue import candidates
from esper_core.blueprint.interface import SlotInterface, canonical_json
from esper_core.blueprint.ir import BlueprintIR
from esper_core.blueprint.widening import units
from esper_core.control.packet import KernelCandidate
from esper_core.control.roles import LoadedKernel
from esper_core.errors import NotFound
from esper_core.ids import content_id
from esper_core.nn.cache import KernelCache


class CatalogueSource:
    """Offers the catalogue's blueprints at several widths and builds the chosen one on request.

    Args:
        widths: units to offer where a blueprint has a width.
        seed: of the initial weights.
        cache: where built weights are kept.
    """

    def __init__(self, widths: Iterable[int], seed: int, cache: KernelCache) -> None:
        self.widths = tuple(widths)
        self.seed = seed
        self.cache = cache
        self._designs: dict[str, tuple[BlueprintIR, SlotInterface, dict[str, int]]] = {}
        self._offers: dict[str, tuple[KernelCandidate, ...]] = {}

    def candidates(self, interface: SlotInterface) -> tuple[KernelCandidate, ...]:
        """Every fitting blueprint × width, named by content."""
        if interface.id not in self._offers:
            self._offers[interface.id] = tuple(self._offer(interface))
        return self._offers[interface.id]

    def request(self, kernel_id: str, interface: SlotInterface) -> None:  # noqa: ARG002 - the role's signature
        """Nothing to fetch; makes the interface's kernels known."""
        self.candidates(interface)

    def poll(self, kernel_id: str) -> LoadedKernel:
        """Build the kernel.

        Raises:
            NotFound: when the catalogue has none of that id for any interface seen.
        """
        if kernel_id not in self._designs:
            raise NotFound(f"no kernel {kernel_id} in the built-in catalogue", hint="name one of the slot's candidates")
        blueprint, interface, symbols = self._designs[kernel_id]
        weights = self.cache.get(kernel_id)
        if weights is None:
            weights = {k: v.detach() for k, v in build(blueprint, interface, symbols, self.seed).state_dict().items()}
            self.cache.put(kernel_id, weights)
        return LoadedKernel(kernel_id, blueprint, interface, symbols, weights)

    def _offer(self, interface: SlotInterface) -> Iterable[KernelCandidate]:
        for _, blueprint, symbols in candidates(interface, self.widths):
            identity = {"blueprint": blueprint.id, "interface": interface.id, "symbols": symbols, "seed": self.seed}
            kernel_id = content_id("kernel", canonical_json(identity))
            self._designs[kernel_id] = (blueprint, interface, symbols)
            cost = analyse(blueprint, interface, symbols)
            width = units(blueprint, interface, symbols)
            yield KernelCandidate(
                kernel_id=kernel_id,
                blueprint_id=blueprint.id,
                blueprint_name=blueprint.name,
                width=width,
                parameters=cost.parameters,
                flops=cost.flops,
                foldable=width > 0,
            )
