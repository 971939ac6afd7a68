"""The built-in catalogue as a source of kernels."""

from __future__ import annotations

import pytest
import torch

from esper_core.blueprint.analyse import analyse
from esper_core.blueprint.build import build
from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.control.source import CatalogueSource
from esper_core.errors import NotFound
from esper_core.nn.cache import KernelCache
from tests.unit.control.growing import catalogue_source
from tests.unit.nn.hosts import equal

FEATURES = SlotInterface(
    layout=Layout.FEATURES, in_width=8, out_width=6, hidden_width=2, activation="relu", foldable=True
)


def test_every_offer_can_be_had_and_is_what_it_says() -> None:
    source = catalogue_source((2, 4))
    offers = source.candidates(FEATURES)
    assert {offer.blueprint_name for offer in offers} == {"bottleneck_mlp", "low_rank", "linear_bypass"}
    assert len({offer.kernel_id for offer in offers}) == len(offers) == 5
    for offer in offers:
        kernel = source.poll(offer.kernel_id)
        module = build(kernel.blueprint, kernel.interface, kernel.symbols)
        module.load_state_dict(dict(kernel.weights))
        assert kernel.blueprint.id == offer.blueprint_id
        assert sum(p.numel() for p in module.parameters()) == offer.parameters
        assert offer.flops == analyse(kernel.blueprint, FEATURES, kernel.symbols).flops
        assert not module(torch.randn(3, 8)).any()
        assert offer.foldable
        assert offer.cost(15) == offer.width * 15


def test_names_are_by_content() -> None:
    first, second, other = catalogue_source(), catalogue_source(), catalogue_source(seed=1)
    offers = [[offer.kernel_id for offer in source.candidates(FEATURES)] for source in (first, second, other)]
    assert offers[0] == offers[1]
    assert not set(offers[0]) & set(offers[2])
    assert equal(dict(first.poll(offers[0][0]).weights), dict(second.poll(offers[0][0]).weights))
    wider = FEATURES.model_copy(update={"in_width": 9})
    assert not set(offers[0]) & {offer.kernel_id for offer in first.candidates(wider)}


def test_a_kernel_asked_for_twice_is_built_once() -> None:
    cache = KernelCache()
    source = CatalogueSource((4,), 0, cache)
    kernel_id = source.candidates(FEATURES)[0].kernel_id
    assert source.poll(kernel_id).weights is source.poll(kernel_id).weights
    assert (cache.stats().hits, cache.stats().misses) == (1, 1)


def test_an_unknown_kernel_is_not_found_until_its_slot_is_known() -> None:
    kernel_id = catalogue_source().candidates(FEATURES)[0].kernel_id
    source = catalogue_source()
    with pytest.raises(NotFound) as caught:
        source.poll(kernel_id)
    assert caught.value.hint
    source.request(kernel_id, FEATURES)
    assert source.poll(kernel_id).kernel_id == kernel_id
