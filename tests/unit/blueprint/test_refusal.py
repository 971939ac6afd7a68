"""Every way in which a blueprint is refused has its own name, the same in the code, on the wire and in a build."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from esper_core.blueprint.analyse import analyse
from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.blueprint.ir import MAX_NODES, BlueprintIR
from esper_core.blueprint.ops import BANNED, REGISTRY
from esper_core.blueprint.refusal import Refusal, code_of
from esper_core.errors import Conflict, InvalidInput, Refused
from esper_core.pb.esper.tezzeret.v1 import tezzeret_pb2

SLOT = SlotInterface(layout=Layout.FEATURES, in_width=6, out_width=4, hidden_width=2, activation="relu")
IMAGE = SlotInterface(layout=Layout.IMAGE, in_width=4, out_width=4, hidden_width=3, in_size=(1, 1), out_size=(1, 1))


def node(name: str, op: str, *inputs: str, **attributes: str) -> dict[str, Any]:
    return {"name": name, "op": op, "inputs": inputs, "attributes": attributes}


def design(*nodes: dict[str, Any], **fields: Any) -> BlueprintIR:
    made = {"name": "x", "nodes": nodes, "output": nodes[-1]["name"] if nodes else "", "layouts": tuple(Layout)}
    return BlueprintIR.model_validate({**made, **fields})


def at(slot: SlotInterface, *nodes: dict[str, Any], **fields: Any) -> None:
    analyse(design(*nodes, **fields), slot)


OUT = node("B", "linear", "input", out="out_width")
CASES: dict[Refusal, Callable[[], object]] = {
    Refusal.MALFORMED: lambda: design({**OUT, "name": "no name"}),
    Refusal.TOO_MANY_NODES: lambda: design(*[node(f"n{n}", "scale", "input") for n in range(MAX_NODES + 1)]),
    Refusal.CYCLE: lambda: design(node("a", "add", "input", "b"), node("b", "scale", "a")),
    Refusal.UNKNOWN_OP: lambda: design(node("a", "liner", "input")),
    Refusal.BANNED_OP: lambda: design(node("a", "dropout", "input")),
    Refusal.BAD_SHAPE: lambda: at(SLOT, node("B", "linear", "input", out="3")),
    Refusal.WRONG_LAYOUT: lambda: at(SLOT, OUT, layouts=(Layout.IMAGE,)),
    Refusal.BAD_SYMBOL: lambda: design(OUT).bind({"width": 3}),
    Refusal.NOT_SILENT: lambda: at(SLOT, OUT, node("s", "activation", "B", kind="sigmoid")),
    Refusal.UNREACHABLE_GRADIENT: lambda: at(
        IMAGE, node("A", "conv", "input", out="4"), node("n", "group_norm", "A", groups="4")
    ),
    Refusal.TOO_LARGE: lambda: at(
        SLOT.model_copy(update={"in_width": 1 << 20}),
        node("A", "linear", "input", out="1000"),
        {**OUT, "inputs": ("A",)},
    ),
    Refusal.DEAD_NODE: lambda: design(node("a", "scale", "input"), OUT),
}


@pytest.mark.parametrize("refusal", Refusal, ids=lambda refusal: refusal.name)
def test_every_reason_has_its_name(refusal: Refusal) -> None:
    with pytest.raises(Refused) as caught:
        CASES[refusal]()
    assert caught.value.code == refusal.name
    assert code_of(caught.value) == refusal
    assert caught.value.hint


def test_names_and_numbers_are_those_of_the_contract() -> None:
    wire = {name.removeprefix("REFUSAL_"): number for name, number in tezzeret_pb2.Refusal.items() if number}
    assert wire == {refusal.name: int(refusal) for refusal in Refusal}


def test_only_bad_input_has_a_code() -> None:
    assert code_of(InvalidInput("x")) == Refusal.MALFORMED
    assert code_of(Conflict("x")) == 0
    assert code_of(Refused("x", code="OF A NEWER PLATFORM")) == Refusal.MALFORMED


def test_no_op_is_banned_and_offered() -> None:
    assert not BANNED.keys() & REGISTRY.keys()


def test_memory_grows_with_the_batch_by_what_the_backward_pass_keeps() -> None:
    found = analyse(design(OUT), SLOT)
    assert found.memory_bytes(0) == 4 * 4 * (6 * 4 + 4)
    assert found.memory_bytes(10) - found.memory_bytes(0) == 4 * 10 * 4
