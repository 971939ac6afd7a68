"""Drawings: boxes never overlap, edges go from bottom to top, and what is written can be read by any browser."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_core.blueprint import pedigree
from esper_core.blueprint.analyse import analyse
from esper_core.blueprint.catalogue import candidates, catalogue
from esper_core.blueprint.drawing import draw
from esper_core.blueprint.interface import ConvGeometry, Layout, SlotInterface
from esper_core.blueprint.ir import BlueprintIR
from esper_core.blueprint.layered import Box, layout

GEOMETRY = ConvGeometry(kernel_h=3, kernel_w=3, padding_h=1, padding_w=1)
SLOTS = (
    SlotInterface(layout=Layout.FEATURES, in_width=640, out_width=32, hidden_width=16, activation="relu", foldable=True),
    SlotInterface(layout=Layout.TOKENS, in_width=64, out_width=64, hidden_width=8, in_size=(12,), out_size=(12,)),
    SlotInterface(
        layout=Layout.IMAGE, in_width=16, out_width=32, hidden_width=24, in_size=(16, 16), out_size=(16, 16),
        activation="relu", source=GEOMETRY, sink=GEOMETRY, foldable=True,
    ),
)  # fmt: skip
SVG = "{http://www.w3.org/2000/svg}"
GAP = 20.0


@st.composite
def graphs(draw: st.DrawFn) -> tuple[dict[str, tuple[float, float]], list[tuple[str, str]]]:
    """Any directed graph, circles and all."""
    names = [f"n{number}" for number in range(draw(st.integers(1, 14)))]
    side = st.floats(10, 200)
    sizes = {name: (draw(side), draw(side)) for name in names}
    return sizes, draw(st.lists(st.tuples(st.sampled_from(names), st.sampled_from(names)), max_size=30))


def apart(one: Box, other: Box, gap: float) -> bool:
    beside = one.x + one.width + gap <= other.x + 1e-6 or other.x + other.width + gap <= one.x + 1e-6
    return beside or one.bottom <= other.y + 1e-6 or other.bottom <= one.y + 1e-6


@settings(max_examples=150, deadline=None)
@given(graph=graphs())
def test_boxes_stand_apart_and_edges_join_them(
    graph: tuple[dict[str, tuple[float, float]], list[tuple[str, str]]],
) -> None:
    sizes, edges = graph
    made = layout(sizes, edges, gap=GAP)
    assert {name: (box.width, box.height) for name, box in made.boxes.items()} == sizes
    for one, other in itertools.combinations(made.boxes.values(), 2):
        assert apart(one, other, GAP)
    assert min(box.x for box in made.boxes.values()) >= -1e-6
    assert max(box.x + box.width for box in made.boxes.values()) <= made.width + 1e-6
    assert max(box.bottom for box in made.boxes.values()) <= made.height + 1e-6
    assert set(made.routes) == {edge for edge in edges if edge[0] != edge[1]}
    for (source, target), route in made.routes.items():
        first, last = made.boxes[source], made.boxes[target]
        assert route[0] == (first.middle, first.bottom)
        assert last.x <= route[-1][0] <= last.x + last.width
        assert route[-1][1] == last.y
    assert layout(sizes, edges, gap=GAP) == made


@settings(max_examples=60, deadline=None)
@given(parents=st.lists(st.integers(0, 30), min_size=1, max_size=24))
def test_a_tree_is_drawn_without_crossings_downwards(parents: list[int]) -> None:
    edges = [(f"n{min(parent, index)}", f"n{index + 1}") for index, parent in enumerate(parents)]
    made = layout({f"n{index}": (40.0, 20.0) for index in range(len(parents) + 1)}, edges)
    for source, target in edges:
        assert made.boxes[source].bottom < made.boxes[target].y
    for one, other in itertools.combinations(edges, 2):
        upper = [made.boxes[name] for name in (one[0], other[0])]
        lower = [made.boxes[name] for name in (one[1], other[1])]
        if upper[0].y == upper[1].y and one[0] != other[0]:
            assert (upper[0].x < upper[1].x) == (lower[0].x < lower[1].x)


def test_a_chain_is_straight_and_a_long_edge_goes_round_it() -> None:
    names = ["a", "b", "c", "d", "e"]
    chain = list(itertools.pairwise(names))
    made = layout(dict.fromkeys(names, (60.0, 30.0)), chain)
    assert len({box.middle for box in made.boxes.values()}) == 1
    made = layout(dict.fromkeys(names, (60.0, 30.0)), [*chain, ("a", "e")])
    for x, y in made.routes["a", "e"][1:-1]:
        for name in "bcd":
            box = made.boxes[name]
            assert not (box.x <= x <= box.x + box.width and box.y <= y <= box.bottom)


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]  # noqa: S314 - our own


@pytest.mark.parametrize("ir", catalogue().values(), ids=lambda ir: ir.name)
def test_every_design_is_drawn_with_all_its_operations(ir: BlueprintIR) -> None:
    shown = texts(draw(ir))
    assert shown[0] == ir.name
    for node in ir.nodes:
        assert node.op.replace("_", " ") in shown
    assert not any("params" in text for text in shown)


@pytest.mark.parametrize("slot", SLOTS, ids=lambda slot: slot.layout.name)
def test_at_a_slot_shapes_and_parameters_are_shown(slot: SlotInterface) -> None:
    for _, ir, symbols in candidates(slot, widths=(16,)):
        analysis = analyse(ir, slot, symbols)
        shown = texts(draw(ir, analysis))
        for shape in analysis.shapes.values():
            assert " × ".join(f"{size:,}" for size in shape) in shown
        costs = [int(text.split()[0].replace(",", "")) for text in shown if re.fullmatch(r"[\d,]+ params", text)]
        assert sum(costs) == analysis.parameters
        assert any(text.startswith(f"{analysis.parameters:,} parameters · {analysis.flops:,} FLOPs") for text in shown)


def test_text_stays_inside_its_box() -> None:
    """By the estimate that boxes are made with; a browser's own letters are narrower."""
    svg = ElementTree.fromstring(draw(catalogue()["squeeze_excite"], analyse(catalogue()["squeeze_excite"], SLOTS[2])))  # noqa: S314
    boxes = [
        Box(*(float(rect.get(side, "0")) for side in ("x", "y", "width", "height")))
        for rect in svg.iter(f"{SVG}rect")
        if (rect.get("class") or "").startswith("box")
    ]
    for text in list(svg.iter(f"{SVG}text"))[3:]:  # after the heading
        x, y, size = (float(text.get(name, "0")) for name in ("x", "y", "font-size"))
        long = len(text.text or "") * size * 0.55
        left = x - {"start": 0.0, "middle": long / 2, "end": long}[text.get("text-anchor", "start")]
        assert any(
            box.x <= left and left + long <= box.x + box.width and box.y + size * 0.7 <= y <= box.bottom - 4
            for box in boxes
        ), text.text


def test_names_from_elsewhere_cannot_break_out() -> None:
    hostile = '<script>alert("x")</script>&'
    members = [
        pedigree.Member("blueprint-" + "a" * 64, hostile, hostile),
        pedigree.Member("blueprint-" + "b" * 64, "", ""),
    ]
    svg = pedigree.draw(members, [(members[1].blueprint_id, members[0].blueprint_id)], members[0].blueprint_id)
    assert "<script" not in svg
    assert texts(svg).count(hostile) == 3
    assert "not in this library" in texts(svg)


def test_a_large_family_is_drawn() -> None:
    members = [pedigree.Member(f"blueprint-{number:064x}", f"design-{number}", "karn") for number in range(1000)]
    ids = [member.blueprint_id for member in members]
    descents = [
        (ids[parent], ids[child]) for child in range(20, 1000) for parent in (child - 20, child - 7 - child % 13)
    ]
    svg = pedigree.draw(members, descents, ids[500])
    assert len(texts(svg)) == 2 + 3 * len(members)
