"""Nouns survive the wire exactly."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from esper_core.blueprint.interface import BatchNorm, SlotInterface
from esper_core.control.packet import Budget, GrowthSignal, HealthSignal, KernelCandidate
from esper_core.errors import InvalidInput
from esper_core.pb.esper.bus.v1 import bus_pb2
from esper_core.pb.esper.core.v1 import blueprint_pb2, kernel_pb2, run_pb2, telemetry_pb2
from esper_core.rpc.convert import from_proto, to_proto
from esper_core.rpc.layers import check

finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=0, allow_infinity=False)
unit = st.floats(min_value=0, max_value=1)
uint32 = st.integers(0, 2**32 - 1)
uint64 = st.integers(0, 2**64 - 1)
signals = st.builds(
    GrowthSignal,
    gain=positive,
    gain_relative=positive,
    share=unit,
    score=positive,
    gain_of_loss=positive,
    spectrum=st.lists(finite, max_size=5).map(tuple),
    confidence=unit,
    samples=uint32,
    unit_parameters=uint32,
    null_gain=positive,
)


def _wire(message: Any) -> Any:
    return type(message).FromString(message.SerializeToString())


@given(signals)
def test_growth_signal_round_trips(signal: GrowthSignal) -> None:
    assert from_proto(_wire(to_proto(signal, telemetry_pb2.GrowthSignal)), GrowthSignal) == signal


@given(
    st.builds(
        HealthSignal,
        slot=st.text(),
        epoch=uint32,
        health=st.none() | unit,
        activation_variance=st.none() | finite,
        gradient_norm=st.none() | finite,
        ready=st.booleans(),
        signal=st.none() | signals,
    )
)
def test_unset_and_zero_stay_apart(signal: HealthSignal) -> None:
    message = _wire(to_proto(signal, telemetry_pb2.HealthSignal))
    assert message.HasField("health") == (signal.health is not None)
    assert message.HasField("signal") == (signal.signal is not None)
    assert from_proto(message, HealthSignal) == signal


@given(st.builds(Budget, parameters=st.none() | uint64, adaptations=uint32))
def test_large_integers_stay_exact(budget: Budget) -> None:
    assert from_proto(_wire(to_proto(budget, telemetry_pb2.Budget)), Budget) == budget


class Node(BaseModel, frozen=True):
    name: str
    op: str = ""
    inputs: tuple[str, ...] = ()
    attributes: dict[str, str] = Field(default_factory=dict)


class Design(BaseModel, frozen=True):
    name: str
    schema_version: int = 1
    symbols: dict[str, int] = Field(default_factory=dict)
    nodes: tuple[Node, ...] = ()
    output: str = ""
    layouts: tuple[int, ...] = ()
    parent_ids: tuple[str, ...] = ()


@given(
    st.builds(
        Design,
        name=st.text(),
        symbols=st.dictionaries(st.text(), st.integers(-(2**63), 2**63 - 1), max_size=4),
        nodes=st.lists(
            st.builds(Node, name=st.text(), attributes=st.dictionaries(st.text(), st.text(), max_size=3)), max_size=4
        ).map(tuple),
        layouts=st.lists(st.integers(0, 3)).map(tuple),
    )
)
def test_lists_maps_enums_and_nested_messages_round_trip(design: Design) -> None:
    assert from_proto(_wire(to_proto(design, blueprint_pb2.BlueprintIR)), Design) == design


class Envelope(BaseModel):
    event_id: str = ""
    created: dt.datetime | None = None
    payload: bytes = b""


@given(st.datetimes(timezones=st.just(dt.UTC)), st.binary())
def test_times_and_bytes_stay_exact(created: dt.datetime, payload: bytes) -> None:
    envelope = Envelope(created=created, payload=payload)
    back = bus_pb2.EventEnvelope.FromString(to_proto(envelope, bus_pb2.EventEnvelope).SerializeToString())
    assert back.payload == payload
    assert back.created == Timestamp(seconds=back.created.seconds, nanos=created.microsecond * 1000)
    assert back.created.ToDatetime(tzinfo=dt.UTC) == created


def test_a_time_without_a_zone_is_refused() -> None:
    with pytest.raises(InvalidInput, match="created"):
        to_proto(Envelope(created=dt.datetime(2026, 1, 1)), bus_pb2.EventEnvelope)


def test_an_empty_message_is_not_an_unset_one() -> None:
    class Metrics(BaseModel):
        validation_loss: float | None = None

    class Run(BaseModel):
        latest: Metrics | None = None

    assert to_proto(Run(latest=Metrics()), run_pb2.Run).HasField("latest")
    assert not to_proto(Run(), run_pb2.Run).HasField("latest")


def test_not_a_number_survives_when_the_model_lets_it() -> None:
    class Measurement(BaseModel):
        gradient_norm: float

    back = to_proto(Measurement(gradient_norm=float("nan")), kernel_pb2.Measurement)
    assert back.gradient_norm != back.gradient_norm


def test_a_value_that_does_not_fit_names_its_field() -> None:
    class Loose(BaseModel):
        width: int

    for value in (-1, 2**64):
        with pytest.raises(InvalidInput, match=r"KernelCandidate\.width"):
            to_proto(Loose(width=value), telemetry_pb2.KernelCandidate)


def test_a_field_the_message_has_not_is_a_programming_error() -> None:
    class Drifted(BaseModel):
        colour: str = "red"

    with pytest.raises(TypeError, match=r"Drifted\.colour"):
        to_proto(Drifted(), telemetry_pb2.KernelCandidate)


def test_what_the_model_forbids_names_the_field() -> None:
    message = telemetry_pb2.GrowthSignal(gain=-1, confidence=7)
    with pytest.raises(InvalidInput) as caught:
        from_proto(message, GrowthSignal)
    assert "gain: " in caught.value.message
    assert "confidence: " in caught.value.message


NORMS = st.builds(
    BatchNorm, eps=st.floats(1e-9, 1), momentum=unit, affine=st.booleans(), track_running_stats=st.booleans()
)


@given(st.none() | NORMS, st.booleans(), st.booleans())
def test_what_stands_between_the_layers_travels_and_obeys_the_contract(
    norm: BatchNorm | None, source: bool, sink: bool
) -> None:
    slot = SlotInterface(
        layout=1, in_width=3, out_width=4, hidden_width=2, norm=norm, source_bias_free=source, sink_bias_free=sink
    )
    message = _wire(to_proto(slot, blueprint_pb2.SlotInterface))
    check(message)
    assert message.HasField("norm") == (norm is not None)
    assert from_proto(message, SlotInterface) == slot


@pytest.mark.parametrize("fault", [{"eps": 0}, {"eps": 2}, {"momentum": -0.1}, {"momentum": 1.1}])
def test_the_contract_and_the_model_refuse_the_same_norms(fault: dict[str, float]) -> None:
    fields = {"eps": 1e-5, "momentum": 0.1} | fault
    with pytest.raises(InvalidInput):
        check(blueprint_pb2.BatchNorm(**fields))
    with pytest.raises(InvalidInput):
        from_proto(blueprint_pb2.BatchNorm(**fields), BatchNorm)


def test_a_candidate_keeps_every_figure() -> None:
    candidate = KernelCandidate(kernel_id="k", width=3, parameters=12, flops=24, foldable=True, forward_seconds=0.5)
    message = to_proto(candidate, telemetry_pb2.KernelCandidate)
    assert (message.width, message.parameters, message.flops, message.foldable) == (3, 12, 24, True)
    assert from_proto(message, KernelCandidate) == candidate
