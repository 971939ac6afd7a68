"""Nothing gets on or off the bus unchecked."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from esper_core import telemetry
from esper_core.bus.envelope import unwrap, wrap
from esper_core.bus.subjects import EPOCH_EVENTS, MAX_PAYLOAD, SUBJECTS, TYPES
from esper_core.errors import InvalidInput
from esper_core.ids import sha256
from esper_core.pb.esper.bus.v1.bus_pb2 import PRIORITY_NORMAL, EpochCompleted, RunEnded, SeedTelemetry
from esper_core.pb.esper.core.v1.error_pb2 import ErrorDetail
from esper_core.pb.esper.core.v1.run_pb2 import EpochMetrics
from esper_core.pb.esper.core.v1.telemetry_pb2 import HealthSignal

MESSAGE = EpochCompleted(run_id="run-1", metrics=EpochMetrics(epoch=3))
GOOD = wrap(MESSAGE, producer="tolaria", run_id="run-1", epoch=3).SerializeToString()


def test_what_was_wrapped_comes_out_again() -> None:
    with telemetry.use() as trace:
        sent = wrap(
            MESSAGE,
            producer="tolaria",
            run_id="run-1",
            epoch=3,
            sequence=7,
            causation_id="c",
            correlation_id="r",
            event_id="e",
        )
    event = unwrap(sent.SerializeToString(), EPOCH_EVENTS.of("run-1"))
    assert event.message == MESSAGE
    assert event.envelope == sent
    assert (sent.event_id, sent.sequence, sent.causation_id, sent.correlation_id) == ("e", 7, "c", "r")
    assert (sent.type, sent.producer, sent.priority) == ("esper.bus.v1.EpochCompleted", "tolaria", PRIORITY_NORMAL)
    assert sent.payload_sha256 == sha256(sent.payload)
    assert sent.traceparent == trace


def test_every_event_gets_an_id_of_its_own_and_equal_payloads_equal_bytes() -> None:
    first, second = (
        wrap(RunEnded(run_id="r", state=2, results=dict.fromkeys(order, 1.0)), producer="tolaria")
        for order in ("abc", "cba")
    )
    assert first.event_id != second.event_id
    assert first.payload == second.payload


def test_a_producer_is_refused_what_a_consumer_would_refuse() -> None:
    with pytest.raises(InvalidInput, match="does not travel on the bus"):
        wrap(ErrorDetail(), producer="tolaria")
    with pytest.raises(InvalidInput, match=r"EpochCompleted breaks its contract: run_id"):
        wrap(EpochCompleted(metrics=EpochMetrics(epoch=1)), producer="tolaria")
    with pytest.raises(InvalidInput, match=r"the envelope breaks its contract: producer"):
        wrap(MESSAGE, producer="")
    with pytest.raises(InvalidInput, match=r"signals.*health"):
        wrap(SeedTelemetry(run_id="r", signals=[HealthSignal(slot="s", health=math.nan)]), producer="tolaria")


def test_the_size_limit_is_exact() -> None:
    def ended(length: int) -> RunEnded:
        """A message of exactly ``length`` bytes; an unknown field (111, bytes) lets it grow past every rule."""
        head = RunEnded(run_id="r", state=2).SerializeToString() + b"\xfa\x06"
        filling = length - len(head) - 3  # a length between 2**14 and 2**21 takes three bytes
        size = bytes([filling & 0x7F | 0x80, filling >> 7 & 0x7F | 0x80, filling >> 14])
        return RunEnded.FromString(head + size + b"x" * filling)

    fits = wrap(ended(MAX_PAYLOAD), producer="tolaria")
    assert len(fits.payload) == MAX_PAYLOAD
    assert unwrap(fits.SerializeToString()).message.run_id == "r"
    with pytest.raises(InvalidInput, match="larger than the bus takes") as caught:
        wrap(ended(MAX_PAYLOAD + 1), producer="tolaria")
    assert "blob" in caught.value.hint


@settings(max_examples=400, deadline=None)
@given(noise=st.binary(max_size=200))
@example(noise=b"")
def test_noise_is_refused_and_never_anything_else(noise: bytes) -> None:
    with pytest.raises(InvalidInput):
        unwrap(noise)


@settings(max_examples=400, deadline=None)
@given(place=st.integers(0, len(GOOD) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_leaves_the_payload_as_it_was(place: int, bit: int) -> None:
    raw = bytearray(GOOD)
    raw[place] ^= 1 << bit
    try:
        event = unwrap(bytes(raw), EPOCH_EVENTS.of("run-1"))
    except InvalidInput:
        return
    assert event.message == MESSAGE


def test_every_declared_type_can_be_opened() -> None:
    assert {name for subject in SUBJECTS for name in subject.types} == set(TYPES)
    for name in TYPES:
        forged = wrap(MESSAGE, producer="tolaria")
        forged.type = name
        forged.payload = b"\xff"
        forged.payload_sha256 = sha256(b"\xff")
        with pytest.raises(InvalidInput, match=f"is no {name}"):
            unwrap(forged.SerializeToString())
