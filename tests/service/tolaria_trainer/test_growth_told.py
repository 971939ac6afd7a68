"""A host that has grown is told of: the forge builds for the widths it has, not for those it once had."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import esper_core
from esper_core.bus.envelope import unwrap
from esper_core.bus.framing import decode
from esper_core.config import Endpoints, load
from esper_core.pb.esper.bus.v1 import bus_pb2
from services.tolaria.config import TolariaConfig
from services.tolaria.history import Boundary, Figures
from services.tolaria.plane import Online


def boundary(epoch: int) -> Boundary:
    figures = Figures(
        epoch=epoch, step=epoch, train_loss=1.0, validation_loss=1.0, validation_accuracy=0.5, learning_rate=0.1,
        train_seconds=1.0, boundary_seconds=0.0, parameters=1,
    )  # fmt: skip
    return Boundary(figures=figures)


def registrations(folder: Path) -> list[bus_pb2.RunRegistered]:
    files = sorted((folder / "spool").glob("*.log"))
    events = [unwrap(record.data, record.subject) for file in files for record in decode(file.read_bytes())]
    return [event.message for event in events if isinstance(event.message, bus_pb2.RunRegistered)]


def test_a_slot_is_registered_again_once_it_is_wider(stack: Endpoints, tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)
    )
    host = esper_core.wrap(model, torch.randn(4, 6))
    slots = list(host.slots.values())
    nowhere = stack.model_copy(update={"grpc_address": "127.0.0.1:9", "nats_url": "nats://127.0.0.1:9"})
    config = load(TolariaConfig, {"services": {"drain_seconds": 0}})
    plane = Online(config, nowhere, "grown", tmp_path)
    try:
        plane.register(slots, 0)
        plane.epoch(boundary(0))
        assert len(registrations(tmp_path)) == 1
        slot = next(slot for slot in slots if slot.interface.hidden_width == 3)
        before = slot.interface.id
        assert slot.layers is not None
        source, sink = slot.layers
        source.weight = nn.Parameter(torch.randn(7, 8))
        sink.weight = nn.Parameter(torch.randn(5, 7))
        plane.epoch(boundary(1))
        plane.epoch(boundary(2))
    finally:
        plane.link.close(0)
    first, again = registrations(tmp_path)
    assert (first.epoch, again.epoch) == (0, 2)  # not 1: that would take back what was told of epoch 1
    widths = {found.slot: found.interface.hidden_width for found in again.run.slots}
    assert widths[slot.name] == 7
    assert slot.interface.id != before
    assert {found.slot for found in again.run.slots} == {found.slot for found in first.run.slots}
