"""What slots cost at an epoch boundary at which nothing is measured, from one slot to ten thousand."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch
from torch import nn

from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.control.grower import Grower
from esper_core.control.packet import HealthSignal
from esper_core.control.settings import GrowthSettings
from esper_core.nn.host import Host
from esper_core.nn.trace import HostGraph, Span
from esper_core.pb.esper.core.v1 import telemetry_pb2
from esper_core.rpc.convert import to_proto
from tests.bench.bench import Pace, Table
from tests.bench.device import settled
from tests.bench.figures import Row, Sample, ratio_row

SLOTS = (1, 10, 100, 1000, 10_000)
NEVER = 1_000_000
SLOT = SlotInterface(
    layout=Layout.FEATURES, in_width=2, out_width=2, hidden_width=2, activation="identity", foldable=True
)
EPOCH_SECONDS = 1.0


def run(pace: Pace) -> list[Table]:
    rows, ways = [], []
    rounds = pace.rounds(30, 5)
    for slots in SLOTS[:3] if pace.quick else SLOTS:
        pace.say(f"{slots} slots")
        quiet, read = _measured(slots, pace.device, rounds)
        rows += quiet
        ways.append(read)
    return [
        Table(
            "An epoch boundary that measures nothing",
            rows,
            (
                "Wall clock, collector off. Dormant: the boundary with no seed at all. Blended: with a kernel in every slot, whose "
                "faults are read from the device. Messages: the signals turned into what goes over the wire. The last column is "
                f"the median over an epoch of {EPOCH_SECONDS:.0f} s.",
            ),
        ),
        Table(
            "Faults of all blended kernels, read one by one / stacked on the device and read in one transfer",
            ways,
            ("As many kernels as slots; a ratio above 1 says that one transfer is cheaper.",),
        ),
    ]


def many(slots: int, device: str) -> Host:
    """A chain of small layers, wrapped without tracing: so many of them would take minutes."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(slots + 1))).to(device)
    spans = tuple(Span(str(place), str(place + 1), SLOT) for place in range(slots))
    return Host(model, HostGraph((), (), spans), spans)


def _measured(slots: int, device: str, rounds: int) -> tuple[list[Row], Row]:
    host = many(slots, device)
    rows = [(torch.zeros(4, 2, device=device), torch.zeros(4, dtype=torch.int64, device=device))]
    optimizer = torch.optim.SGD(host.parameters(), lr=1e-6)
    settings = GrowthSettings(warmup_epochs=NEVER)
    grower = Grower(host, optimizer, nn.functional.cross_entropy, probe=rows, validation=rows, settings=settings)
    boundary = lambda: grower.step(0, train_loss=1.0).health
    dormant = _seconds(boundary, device, rounds)
    signals = boundary()
    messages = _seconds(lambda: _told(signals), device, rounds)
    grafts = [slot.bind(nn.Identity()) for slot in host.slots.values()]
    for graft in grafts:
        graft.attach()
    blended = _seconds(boundary, device, rounds)
    single = _seconds(lambda: [int(graft.faults) for graft in grafts], device, rounds)
    at_once = _seconds(lambda: torch.stack([graft.faults for graft in grafts]).tolist(), device, rounds)
    counted = f"{slots:,} slot{'s' if slots > 1 else ''}"
    found = {"dormant": dormant, "blended": blended, "messages": messages}
    return (
        [_row(f"{counted}, {what}", slots, seconds) for what, seconds in found.items()],
        ratio_row(counted, single, at_once),
    )


def _told(signals: tuple[HealthSignal, ...]) -> list[telemetry_pb2.HealthSignal]:
    return [to_proto(signal, telemetry_pb2.HealthSignal) for signal in signals]


def _row(what: str, slots: int, seconds: list[float]) -> Row:
    row = Sample(tuple(seconds)).row(what, "ms", 1e3)
    middle = Sample(tuple(seconds)).median
    return {key: row[key] for key in row if key != "p99"} | {
        "µs/slot": middle * 1e6 / slots,
        "of an epoch": middle / EPOCH_SECONDS,
    }


def _seconds(work: Callable[[], object], device: str, rounds: int) -> list[float]:
    found = []
    gc.disable()
    try:
        for number in range(rounds + 1):
            settled(device)
            began = time.perf_counter()
            work()
            settled(device)
            if number:
                found.append(time.perf_counter() - began)
    finally:
        gc.enable()
    return found
