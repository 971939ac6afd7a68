"""The forge turns every catalogue design into bytes that compute the same, and the assortment is a sane one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from esper_core.blueprint.build import build
from esper_core.blueprint.catalogue import WIDTHS, candidates, catalogue
from esper_core.blueprint.interface import BatchNorm, Layout, SlotInterface
from esper_core.errors import InvalidInput
from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.pack import load
from services.tezzeret.assortment import WIDENERS, assortment
from services.tezzeret.builds import COMPILING, PIPELINE, Wish
from services.tezzeret.forge import forge, parity
from services.tezzeret.worker import seed_of

CONV = {"kernel_h": 3, "kernel_w": 3, "padding_h": 1, "padding_w": 1}
SLOTS = (
    SlotInterface(layout=Layout.FEATURES, in_width=12, out_width=7, hidden_width=3, activation="relu", foldable=True),
    SlotInterface(layout=Layout.TOKENS, in_width=12, out_width=12, hidden_width=3),
    SlotInterface(
        layout=Layout.IMAGE,
        in_width=3,
        out_width=5,
        hidden_width=4,
        in_size=(6, 6),
        out_size=(6, 6),
        source=CONV,
        sink=CONV,
    ),
)
NORMED = SLOTS[2].model_copy(update={"norm": BatchNorm(), "source_bias_free": True, "sink_bias_free": True})


def job(path: Path, slot: SlotInterface, name: str = "bottleneck_mlp", **changes: Any) -> dict[str, Any]:
    made = {
        "blueprint": catalogue()[name].model_dump(mode="json"),
        "interface": slot.model_dump(mode="json"),
        "symbols": {},
        "pipeline": "standard",
        "seed": 7,
        "blob": str(path),
    }
    return {**made, **changes}


@pytest.mark.parametrize("slot", [*SLOTS, NORMED], ids=lambda slot: f"{slot.layout.name}-{bool(slot.norm)}")
def test_every_design_is_forged_into_bytes_that_compute_the_same(tmp_path: Path, slot: SlotInterface) -> None:
    for name, ir, symbols in candidates(slot, [4]):
        path = tmp_path / name
        manifest = KernelManifest.model_validate(forge(job(path, slot, name, symbols=symbols))["manifest"])
        made = manifest.provenance
        assert (made.parity_max_abs_diff, made.toolchain["torch"]) == (0.0, torch.__version__)
        assert 0 < made.build_seconds < 10
        rebuilt, built = load(path.read_bytes(), manifest), build(ir, slot, symbols, seed=7)
        state, its_state = rebuilt.state_dict(), built.state_dict()
        assert state.keys() == its_state.keys()
        assert all(torch.equal(state[key], its_state[key]) for key in state)
        assert manifest.symbols == ir.bind(symbols)


def test_forging_again_gives_the_same_kernel(tmp_path: Path) -> None:
    first, second = (forge(job(tmp_path / name, SLOTS[0]))["manifest"] for name in "ab")
    assert first["kernel_id"] == second["kernel_id"]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    third = forge(job(tmp_path / "c", SLOTS[0], seed=8))["manifest"]
    assert third["kernel_id"] != first["kernel_id"]


def test_parity_sees_every_parameter() -> None:
    ir = catalogue()["bottleneck_mlp"]
    for name, _ in build(ir, SLOTS[0]).named_parameters():
        built, rebuilt = build(ir, SLOTS[0], seed=1), build(ir, SLOTS[0], seed=1)
        assert parity(built, rebuilt, SLOTS[0]) == 0
        with torch.no_grad():
            rebuilt.get_parameter(name).view(-1)[0] += 0.25
        assert parity(built, rebuilt, SLOTS[0]) >= 0.25


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="does not serve"):
        forge(job(tmp_path / "x", SLOTS[0], "squeeze_excite"))
    huge = SLOTS[0].model_copy(update={"in_width": 1 << 20, "out_width": 1 << 20})
    with pytest.raises(InvalidInput, match="exceeds"):
        forge(job(tmp_path / "x", huge, "linear_bypass"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("slot", SLOTS, ids=lambda slot: slot.layout.name)
def test_for_a_run_that_trusts_compiled_code_wideners_are_compiled_and_nothing_else_changes(
    slot: SlotInterface,
) -> None:
    plain, compiled = assortment(slot), assortment(slot, compiling=True)
    assert {wish.pipeline for wish in plain} == {PIPELINE}
    wanted = [COMPILING if wish.blueprint_name in WIDENERS else PIPELINE for wish in plain]
    assert [wish.pipeline for wish in compiled] == wanted
    assert [wish.model_copy(update={"pipeline": PIPELINE}) for wish in compiled] == plain


@pytest.mark.parametrize("slot", SLOTS, ids=lambda slot: slot.layout.name)
def test_the_assortment_offers_wideners_first_in_every_width_and_each_other_design_once(slot: SlotInterface) -> None:
    wishes = assortment(slot)
    assert [wish.rank for wish in wishes] == list(range(len(wishes)))
    assert len({wish.build_id for wish in wishes}) == len(wishes)
    names = [wish.blueprint_name for wish in wishes]
    wideners = [name for name in names if name in WIDENERS]
    assert names[: len(wideners)] == wideners
    assert {wish.symbols["width"] for wish in wishes[: len(wideners)]} == set(WIDTHS)
    assert wishes[0].symbols["width"] == 8
    others = names[len(wideners) :]
    assert len(set(others)) == len(others)
    assert set(names) == {name for name, _, _ in candidates(slot)}


def test_a_build_is_named_by_what_is_wished() -> None:
    wish = Wish(blueprint_id="blueprint-" + "0" * 64, interface=SLOTS[0], symbols={"a": 1, "b": 2})
    same = Wish(blueprint_id=wish.blueprint_id, interface=SLOTS[0], symbols={"b": 2, "a": 1}, rank=9)
    assert wish.build_id == same.build_id
    for change in ({"symbols": {"a": 1}}, {"pipeline": "fast"}, {"interface": SLOTS[1]}):
        assert wish.model_copy(update=change).build_id != wish.build_id
    assert 0 <= seed_of(wish.build_id) < 1 << 64
