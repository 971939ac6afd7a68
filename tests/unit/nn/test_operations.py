"""Operations counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esper_core.blueprint.build import KernelModule
from esper_core.nn.host import wrap
from esper_core.nn.operations import slowdown
from tests.unit.nn.hosts import planted


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize(
    ("model", "shape", "name", "blueprint", "positions", "by_hand"),
    [
        # units x inputs of one x taps x positions, and the head
        (
            nn.Sequential(
                nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.Flatten(),
                nn.Linear(24, 3),
            ),
            (5, 2, 6, 6), "0:2", "conv_bypass_3x3", 1, 2 * (4 * 1 * 9 * 36 + 6 * 4 * 9 * 4 + 24 * 3),
        ),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (3, 4), "0:2", "bottleneck_mlp", 1, 2 * (32 + 16)),
        # every token, of the kernel as of the host
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (3, 7, 4), "0:2", "bottleneck_mlp", 7, 7 * 2 * (32 + 16)),
    ],
)  # fmt: skip
def test_each_weight_counts_twice_at_each_position(
    model: nn.Module, shape: tuple[int, ...], name: str, blueprint: str, positions: int, by_hand: int, attached: bool
) -> None:
    host = wrap(model, inputs := torch.randn(shape))
    slot = host.slots[name]
    planted(slot, blueprint, width=4)
    assert slot.graft is not None
    assert isinstance(slot.graft.kernel, KernelModule)
    slot.graft.alpha.fill_(1)
    if attached:
        slot.graft.attach()
    own = slot.graft.kernel.analysis.flops * positions
    assert slowdown(host, slot, (inputs, torch.zeros(len(inputs)))) == own / by_hand
