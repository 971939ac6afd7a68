"""Host networks fit their data, can be traced, and refuse data they cannot take."""

from __future__ import annotations

import pytest
import torch

from esper_core.errors import InvalidInput
from esper_core.nn.host import wrap
from services.tolaria import hosts
from services.tolaria.config import ModelConfig

CASES = [
    (ModelConfig(host="mlp", widths=(8, 2, 8)), (5,), 0),
    (ModelConfig(host="mlp", widths=(8, 4), activation="gelu"), (1, 8, 8), 0),
    (ModelConfig(host="cnn", channels=(4, 2, 8)), (1, 8, 8), 0),
    (ModelConfig(host="resnet", channels=(4, 8), blocks=1), (3, 16, 16), 0),
    (ModelConfig(host="transformer", width=8, heads=2, layers=2, ffn=(16, 4)), (3,), 12),
]


@pytest.mark.parametrize(("config", "shape", "tokens"), CASES)
def test_a_host_maps_a_batch_to_outputs_and_has_places_to_grow(
    config: ModelConfig, shape: tuple[int, ...], tokens: int
) -> None:
    torch.manual_seed(0)
    model = hosts.build(config, shape, tokens, 7)
    batch = torch.randint(0, tokens, (4, *shape)) if tokens else torch.randn(4, *shape)
    assert model(batch).shape == (4, 7)
    host = wrap(model, batch)
    assert host.slots
    assert torch.equal(host(batch), model(batch))


def test_the_resnet_is_the_published_twenty_layers() -> None:
    model = hosts.build(ModelConfig(host="resnet"), (3, 32, 32), 0, 10)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(layers) + 1 == 20  # and the head


@pytest.mark.parametrize(
    ("host", "shape", "tokens"),
    [("cnn", (64,), 0), ("transformer", (64,), 0), ("mlp", (3,), 9), ("resnet", (3,), 9), ("cnn", (1, 2, 2), 0)],
)
def test_a_host_refuses_data_of_the_wrong_shape(host: str, shape: tuple[int, ...], tokens: int) -> None:
    with pytest.raises(InvalidInput) as caught:
        hosts.build(ModelConfig(host=host), shape, tokens, 3)  # type: ignore[arg-type]
    assert caught.value.hint
