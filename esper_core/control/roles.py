"""The two parts of growing that may live elsewhere: who decides, and where kernels come from.

In library mode both are in the process (``HeuristicController``, ``CatalogueSource``); on the platform they ask Tamiyo and Urza.
Neither may block a training step, and neither's absence stops one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from esper_core.blueprint.analyse import analyse
from esper_core.blueprint.interface import SlotInterface
from esper_core.blueprint.ir import BlueprintIR
from esper_core.blueprint.widening import widening
from esper_core.control.packet import AdaptationSignal, KernelCandidate, SystemStatePacket, lasting_parameters
from esper_core.nn.native import Native


@dataclass(frozen=True)
class LoadedKernel:
    """A verified kernel, ready to be built.

    Attributes:
        weights: by parameter name of the built module.
        native: compiled code for it, where the run trusts some; the kernel is whole without.
        eager: why it has none, where the run trusts some.
    """

    kernel_id: str
    blueprint: BlueprintIR
    interface: SlotInterface
    symbols: Mapping[str, int]
    weights: Mapping[str, Tensor]
    native: Native | None = None
    eager: str = ""

    def cost(self, unit_parameters: int) -> int:
        """Parameters that the host will have more of in the end.

        Raises:
            InvalidInput: when the blueprint does not fit the interface.
        """
        analysis = analyse(self.blueprint, self.interface, self.symbols)
        found = widening(self.interface, self.blueprint.output, analysis)
        return lasting_parameters(found.units if found else 0, analysis.parameters, unit_parameters)


class Controller(Protocol):
    """Decides on a run's epoch."""

    def decide(self, packet: SystemStatePacket) -> AdaptationSignal | None:
        """An answer, or None when there is none in time; nothing is done then."""
        ...


class KernelSource(Protocol):
    """Finds and fetches kernels."""

    def candidates(self, interface: SlotInterface) -> tuple[KernelCandidate, ...]:
        """What could be put into such a slot; empty when only the controller knows."""
        ...

    def request(self, kernel_id: str, interface: SlotInterface) -> None:
        """Begin to fetch a kernel; returns at once and may be repeated."""
        ...

    def poll(self, kernel_id: str) -> LoadedKernel | None:
        """The kernel when it is there and verified, None while it is on its way.

        Raises:
            EsperError: when it can never be had.
        """
        ...
