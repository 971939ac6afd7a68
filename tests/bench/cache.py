"""What a kernel costs when it is at hand and when it is not: the cache itself, building, and binding to a slot."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count

import torch
from torch import nn

from esper_core.blueprint.interface import SlotInterface
from esper_core.control.plot import Plot
from esper_core.control.settings import GrowthSettings
from esper_core.control.source import CatalogueSource
from esper_core.nn.cache import DEFAULT_BYTES, KernelCache
from tests.bench.bench import Pace, Table
from tests.bench.device import settled
from tests.bench.dormant import families, wrapped
from tests.bench.figures import Row, Sample
from tests.bench.nets import Family, adam

WIDTHS = (4, 8, 16, 32)


def run(pace: Pace) -> list[Table]:
    rounds = pace.rounds(60, 8)
    kernels = []
    for family in families(pace, 1):
        pace.say(family.name)
        kernels += _kernel(family, rounds)
    return [
        Table("The cache itself", _itself(rounds), ("Wall clock. Full: every put lets an older kernel go.",)),
        Table(
            "A catalogue kernel for one slot, the widest on offer",
            kernels,
            (
                "Wall clock. Offers: every fitting design and width analysed, once per interface and run. Not at hand: built, "
                "initialised and kept. Bound: verified against its blueprint, loaded, and brought to the host's device.",
            ),
        ),
    ]


def _itself(rounds: int) -> list[Row]:
    weights = {"A.weight": torch.zeros(32, 64), "B.weight": torch.zeros(64, 32)}
    size = sum(tensor.nbytes for tensor in weights.values())
    roomy, full = KernelCache(DEFAULT_BYTES), KernelCache(100 * size)
    for number in range(100):
        roomy.put(str(number), weights)
        full.put(str(number), weights)
    fresh = count(100)
    return [
        _sample("a hit among 100", lambda: roomy.get("50"), 50 * rounds),
        _sample("a miss", lambda: roomy.get("none"), 50 * rounds),
        _sample("a put into a full one of 100", lambda: full.put(str(next(fresh)), weights), 20 * rounds),
    ]


def _kernel(family: Family, rounds: int) -> list[Row]:
    host = wrapped(family)
    rows = [family.rows(32)]
    plot = Plot(host, adam(host), nn.functional.cross_entropy, rows, rows, GrowthSettings(), 0)
    slot = host.slots[family.slot_name]
    interface = slot.interface
    source = CatalogueSource(WIDTHS, 0, KernelCache())
    kernel_id = max(source.candidates(interface), key=lambda offer: offer.parameters).kernel_id
    kernel = source.poll(kernel_id)

    def bind() -> None:
        plot.plant(slot, kernel)
        settled(family.device)

    binding = []
    for _ in range(rounds + 1):
        binding.append(_seconds(bind))
        slot.release()
    offers = [_seconds(lambda: _offered(interface)) for _ in range(rounds + 1)]
    building = []
    for _ in range(rounds + 1):
        source.cache = KernelCache()
        building.append(_seconds(lambda: source.poll(kernel_id)))
    return [
        _row(f"{family.name}: offers", offers),
        _row(f"{family.name}: not at hand", building),
        _sample(f"{family.name}: at hand", lambda: source.poll(kernel_id), rounds),
        _row(f"{family.name}: bound", binding),
    ]


def _offered(interface: SlotInterface) -> None:
    CatalogueSource(WIDTHS, 0, KernelCache()).candidates(interface)


def _sample(what: str, work: Callable[[], object], rounds: int) -> Row:
    return _row(what, [_seconds(work) for _ in range(rounds + 1)])


def _row(what: str, seconds: list[float]) -> Row:
    """All but the first, which warms up."""
    return Sample(tuple(seconds[1:])).row(what, "µs", 1e6)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
