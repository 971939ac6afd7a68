"""Which kernels a new slot is offered without anybody asking: the built-in designs that fit it, most useful first.

Wideners, which can become part of the host's own weights, come in several widths so that a controller can buy as much
as the spectrum asks for; every other design comes in one.
"""

from __future__ import annotations

from esper_core.blueprint.catalogue import DEFAULT_WIDTH, WIDTHS, candidates
from esper_core.blueprint.interface import SlotInterface
from services.tezzeret.builds import COMPILING, PIPELINE, Estimate, Wish

WIDENERS = frozenset({"bottleneck_mlp", "conv_bypass_3x3"})
USEFUL_WIDTHS = tuple(sorted(WIDTHS, key=lambda width: (width < DEFAULT_WIDTH, width)))
"""8, 16, 32, 4: the narrowest is rarely enough and is built last."""


def assortment(interface: SlotInterface, *, compiling: bool = False) -> list[Wish]:
    """One wish per design and width; ``rank`` is the position.

    Args:
        interface: the slot's.
        compiling: whether wideners shall be compiled: the others, taken only where no widener is, are not worth the time.
    """
    chosen = [
        (name, ir, ir.bind(symbols))
        for name, ir, symbols in candidates(interface, USEFUL_WIDTHS)
        if name in WIDENERS or symbols.get("width", DEFAULT_WIDTH) == DEFAULT_WIDTH
    ]
    chosen.sort(key=lambda choice: choice[0] not in WIDENERS)
    return [
        Wish(
            blueprint_id=ir.id,
            blueprint_name=name,
            interface=interface,
            symbols=symbols,
            pipeline=COMPILING if compiling and name in WIDENERS else PIPELINE,
            rank=rank,
            estimate=Estimate.of(ir, interface, symbols),
        )
        for rank, (name, ir, symbols) in enumerate(chosen)
    ]
