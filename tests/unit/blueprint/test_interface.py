"""SlotInterface: ids, shapes and contradictions."""

import pytest

from esper_core.blueprint.interface import BatchNorm, ConvGeometry, Layout, SlotInterface, canonical_json
from esper_core.errors import InvalidInput
from esper_core.ids import content_id

WINDOW = {"kernel_h": 3, "kernel_w": 3, "padding_h": 1, "padding_w": 1}
ROW = {"layout": 1, "in_width": 4, "out_width": 5, "hidden_width": 2}
IMAGE = {**ROW, "layout": 3, "in_size": (8, 8), "out_size": (8, 8)}


def test_equal_interfaces_have_equal_ids_and_any_change_gives_another() -> None:
    one = SlotInterface.model_validate(ROW)
    assert one.id == SlotInterface.model_validate(ROW).id
    assert one.id.startswith("interface-")
    changed = [SlotInterface.model_validate({**ROW, key: 7}).id for key in ("in_width", "out_width", "hidden_width")]
    assert len({one.id, *changed, SlotInterface.model_validate({**ROW, "activation": "relu"}).id}) == 5


def test_ids_from_before_there_were_norms_stay() -> None:
    first = {"in_size": [], "out_size": [], "activation": "", "source": None, "sink": None, "foldable": False}
    slot = SlotInterface.model_validate(ROW)
    assert slot.id == content_id("interface", canonical_json({**ROW, **first}))
    younger = {"norm": BatchNorm(), "source_bias_free": True, "sink_bias_free": True}
    changed = [slot.model_copy(update={name: value}) for name, value in younger.items()]
    assert len({slot.id, *(other.id for other in changed)}) == 4
    assert [SlotInterface.model_validate(other.model_dump(mode="json")) for other in changed] == changed


def test_shapes_follow_the_layout() -> None:
    assert SlotInterface.model_validate(ROW).in_shape == (4,)
    assert SlotInterface.model_validate({**ROW, "layout": 2}).out_shape == (1, 5)
    counted = SlotInterface.model_validate({**ROW, "layout": 2, "in_size": (7,), "out_size": (7,)})
    assert counted.in_shape == (7, 4)
    assert SlotInterface.model_validate(IMAGE).out_shape == (5, 8, 8)


@pytest.mark.parametrize(
    "fields",
    [
        {**ROW, "in_size": (3,)},
        {**IMAGE, "in_size": ()},
        {**IMAGE, "in_size": (0, 8)},
        {**ROW, "layout": 2, "in_size": (3,), "out_size": (4,)},
        {**ROW, "activation": "reluu"},
        {**ROW, "source": WINDOW},
        {**ROW, "foldable": True},
        {**IMAGE, "foldable": True, "activation": "relu"},
        {**ROW, "layout": 2, "norm": {}},
        {**IMAGE, "foldable": True, "activation": "relu", "source": WINDOW, "sink": {**WINDOW, "stride_h": 2}},
    ],
)
def test_contradictions_are_refused_with_a_hint(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidInput) as caught:
        SlotInterface.model_validate(fields)
    assert caught.value.hint


def test_a_convolution_leaves_what_the_formula_says() -> None:
    geometry = ConvGeometry(kernel_h=3, kernel_w=5, stride_h=2, stride_w=1, padding_h=1, padding_w=0, dilation_w=2)
    assert geometry.leaving((9, 12)) == ((9 + 2 - 2 - 1) // 2 + 1, (12 - 8 - 1) // 1 + 1)
    assert SlotInterface.model_validate(IMAGE).layout is Layout.IMAGE
