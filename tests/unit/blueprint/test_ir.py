"""BlueprintIR: canonical bytes, and refusal of what is malformed."""

import contextlib
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_core.blueprint.catalogue import catalogue
from esper_core.blueprint.ir import MAX_BYTES, BlueprintIR
from esper_core.errors import InvalidInput, Unsupported

A = {"name": "A", "op": "linear", "inputs": ["input"], "attributes": {"out": "width", "bias": "no"}}
B = {"name": "B", "op": "linear", "inputs": ["A"], "attributes": {"out": "out_width"}}
GOOD: dict[str, Any] = {"name": "x", "symbols": {"width": 4}, "nodes": [A, B], "output": "B", "layouts": [1, 2]}


def with_node(**changes: Any) -> dict[str, Any]:
    return {**GOOD, "nodes": [{**A, **changes}, B]}


def test_the_good_one_is_good() -> None:
    assert BlueprintIR.model_validate(GOOD).bind({"width": 9}) == {"width": 9}


@given(st.randoms(use_true_random=False))
def test_the_id_does_not_depend_on_the_order_of_keys(random: Any) -> None:
    def shuffled(value: Any) -> Any:
        if isinstance(value, dict):
            items = [(key, shuffled(item)) for key, item in value.items()]
            random.shuffle(items)
            return dict(items)
        return [shuffled(item) for item in value] if isinstance(value, list) else value

    assert BlueprintIR.from_json(json.dumps(shuffled(GOOD)).encode()).id == BlueprintIR.model_validate(GOOD).id


@pytest.mark.parametrize("ir", catalogue().values(), ids=catalogue().keys())
def test_canonical_bytes_come_back_as_the_same_blueprint(ir: BlueprintIR) -> None:
    again = BlueprintIR.from_json(ir.canonical())
    assert (again, again.id, again.canonical()) == (ir, ir.id, ir.canonical())
    assert b" " not in ir.canonical().replace(b" // ", b"").replace(b", ", b"")


def test_any_change_gives_another_id() -> None:
    other = BlueprintIR.model_validate(with_node(attributes={"out": "width + 1", "bias": "no"}))
    child = BlueprintIR.model_validate({**GOOD, "parent_ids": [other.id]})
    assert len({BlueprintIR.model_validate(GOOD).id, other.id, child.id}) == 3


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (with_node(op="linaer"), "linear"),
        (with_node(op="exec"), "known"),
        (with_node(name="B"), "own name"),
        (with_node(name="input"), "reserved"),
        (with_node(name="a" * 65), "1-64"),
        (with_node(name="a.b"), "1-64"),
        (with_node(inputs=["B"]), "topological"),
        (with_node(inputs=["A"]), "topological"),
        (with_node(inputs=["inptu"]), "input"),
        (with_node(inputs=[]), "linear takes 1"),
        (with_node(inputs=["input"] * 500), "linear takes 1"),
        (with_node(attributes={}), "cannot do without"),
        (with_node(attributes={"out": "width", "baes": "no"}), "bias"),
        (with_node(attributes={"out": "width", "bias": "maybe"}), "no"),
        (with_node(attributes={"out": "widht"}), "width"),
        (with_node(attributes={"out": "9" * 10_000}), "128"),
        (with_node(attributes={"out": 4}), "BlueprintIR"),
        ({**GOOD, "output": "C"}, "known"),
        ({**GOOD, "output": "input"}, "known"),
        ({**GOOD, "output": "A"}, "remove it"),
        ({**GOOD, "nodes": []}, "at least one"),
        ({**GOOD, "nodes": [A] * 257}, "256"),
        ({**GOOD, "nodes": [A] * 1_000_000}, "256"),
        ({**GOOD, "layouts": []}, "FEATURES"),
        ({**GOOD, "layouts": [1, 1]}, "FEATURES"),
        ({**GOOD, "layouts": [9]}, "BlueprintIR"),
        ({**GOOD, "name": "N" * 100}, "1-80"),
        ({**GOOD, "name": "x\n"}, "1-80"),
        ({**GOOD, "symbols": {"width": 10**9}}, "1048576"),
        ({**GOOD, "symbols": {"width": 0}}, "1048576"),
        ({**GOOD, "symbols": {"width": 4, "in_width": 4}}, "reserved"),
        ({**GOOD, "symbols": {"width": 4, "max": 4}}, "reserved"),
        ({**GOOD, "parent_ids": ["blueprint-1"]}, "64 hex"),
        ({**GOOD, "parent_ids": ["blueprint-" + "0" * 64 + "\n"]}, "64 hex"),
        ({**GOOD, "code": "import os"}, "BlueprintIR"),
        ("x", "BlueprintIR"),
    ],
)
def test_what_is_malformed_is_refused_with_a_hint(value: Any, hint: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        BlueprintIR.model_validate(value)
    assert caught.value.hint
    assert hint in caught.value.hint


def test_another_schema_is_unsupported() -> None:
    with pytest.raises(Unsupported):
        BlueprintIR.model_validate({**GOOD, "schema_version": 2})


def test_unknown_symbols_are_refused_by_name() -> None:
    with pytest.raises(InvalidInput) as caught:
        BlueprintIR.model_validate(GOOD).bind({"widht": 4})
    assert caught.value.hint == "did you mean 'width'?"


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"null", b"[" * 60_000, b'{"a":' * 10_000, b"x" * (MAX_BYTES + 1), b"\xff\xfe", b'{"name": NaN}'],
)
def test_bytes_that_are_no_blueprint_are_refused_quickly(data: bytes) -> None:
    start = time.monotonic()
    with pytest.raises(InvalidInput) as caught:
        BlueprintIR.from_json(data)
    assert caught.value.hint
    assert time.monotonic() - start < 1


@given(st.binary(max_size=300), st.integers(0, 400))
def test_a_mutated_blueprint_is_another_blueprint_or_refused(noise: bytes, at: int) -> None:
    data = BlueprintIR.model_validate(GOOD).canonical()
    with contextlib.suppress(InvalidInput, Unsupported):
        BlueprintIR.from_json(data[:at] + noise + data[at + len(noise) :])


def test_a_long_chain_is_no_problem_and_a_longer_one_is_refused() -> None:
    chain = [{"name": f"n{i}", "op": "scale", "inputs": [f"n{i - 1}" if i else "input"]} for i in range(257)]
    assert BlueprintIR.model_validate({**GOOD, "nodes": chain[:256], "output": "n255"}).output == "n255"
    with pytest.raises(InvalidInput):
        BlueprintIR.model_validate({**GOOD, "nodes": chain, "output": "n256"})
