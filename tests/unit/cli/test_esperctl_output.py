"""JSON says what the contract says; tables show it to people and nothing else."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_core.cli import output
from esper_core.cli.output import cell, clean, enum_name, enum_value, plain, short, table
from esper_core.lifecycle import State
from esper_core.pb.esper.bus.v1.bus_pb2 import EventEnvelope
from esper_core.pb.esper.core.v1.kernel_pb2 import Attestation, KernelRecord, KernelStatus
from esper_core.pb.esper.core.v1.lifecycle_pb2 import Seed, SeedEvent, SeedState
from esper_core.pb.esper.core.v1.run_pb2 import EpochMetrics, Run


def printed(view) -> str:
    page = io.StringIO()
    output._print(view, page)
    return page.getvalue()


def test_plain_spells_every_field_with_its_kind():
    event = SeedEvent(seed_id="r/s/0", source=4, target=5, epoch=7, measurements={"b": 2.5, "a": 1.0})
    assert plain(event) == {
        "seed_id": "r/s/0",
        "run_id": "",
        "slot": "",
        "generation": 0,
        "source": "TRAINING",
        "target": "GRAFTING",
        "epoch": 7,
        "reason": "",
        "command_id": "",
        "kernel_id": "",
        "blueprint_name": "",
        "alpha": 0.0,
        "measurements": {"a": 1.0, "b": 2.5},
        "execution": "",
    }


def test_plain_tells_unmeasured_from_nought():
    assert plain(EpochMetrics())["validation_loss"] is None
    assert plain(EpochMetrics(validation_loss=0.0))["validation_loss"] == 0.0
    assert plain(Run())["latest"] is None
    assert plain(Run(latest=EpochMetrics()))["latest"]["epoch"] == 0


def test_plain_keeps_large_integers_and_bytes_exact():
    assert plain(Run(seed=2**64 - 1))["seed"] == 2**64 - 1
    assert plain(Attestation(payload=b"\x00\xff"))["payload"] == "AP8="


def test_plain_goes_into_repeated_messages_and_stamps():
    record = KernelRecord(attestations=[Attestation(key_id="k")], tags=["a", "b"])
    assert plain(record)["attestations"][0]["key_id"] == "k"
    assert plain(record)["tags"] == ["a", "b"]
    envelope = EventEnvelope()
    envelope.created.FromJsonString("2025-01-02T03:04:05Z")
    assert plain(envelope)["created"] == "2025-01-02T03:04:05Z"


@pytest.mark.parametrize(
    ("value", "spelled"), [(float("nan"), "NaN"), (float("inf"), "Infinity"), (-float("inf"), "-Infinity")]
)
def test_plain_is_json_even_when_a_figure_is_not_finite(value, spelled):
    document = plain(EpochMetrics(train_loss=value))
    assert json.loads(json.dumps(document, allow_nan=False))["train_loss"] == spelled


def test_every_state_has_the_same_name_on_both_sides():
    for state in State:
        assert enum_name(SeedState.DESCRIPTOR, state) == state.name
        assert enum_value(SeedState.DESCRIPTOR, state.name) == state


def test_a_state_of_a_later_version_is_shown_by_number():
    assert enum_name(SeedState.DESCRIPTOR, 99) == "99"
    assert plain(Seed(state=99))["state"] == "99"  # type: ignore[arg-type]


def test_kernel_statuses_by_short_name():
    assert [enum_name(KernelStatus.DESCRIPTOR, n) for n in range(1, 5)] == [
        "COMPILED",
        "VALIDATED",
        "REJECTED",
        "RETIRED",
    ]


@given(st.text())
def test_nothing_that_moves_a_cursor_survives(text):
    cleaned = clean(text)
    assert cleaned.isprintable()
    assert len(cleaned) == len(text)
    assert all(after == before for before, after in zip(text, cleaned, strict=True) if before.isprintable())


def test_a_table_off_a_terminal_is_bare_columns_and_cuts_nothing():
    long = "reason " * 60
    page = printed(table((">N", "NAME", "*WHY"), [(1, "a", long), (20, "[b]", None)], empty="none"))
    lines = page.splitlines()
    assert lines[0].split() == ["N", "NAME", "WHY"]
    assert long.strip() in lines[1]
    assert lines[2].split() == ["20", "[b]", "-"]
    assert len(lines) == 3
    assert "\x1b" not in page


def test_an_empty_table_says_so():
    assert printed(table(("A",), [], empty="nothing here")) == "nothing here\n"


def test_cells():
    assert cell(None).plain == "-"
    assert cell(0.0).plain == "0"
    assert cell(0).plain == "0"
    assert cell(True).plain == "yes"
    assert cell(1 / 3).plain == "0.3333"
    assert cell("a\x1b[31m\nb").plain == "a\N{REPLACEMENT CHARACTER}[31m b"


def test_fields_leave_out_what_is_empty_but_not_nought():
    page = printed(output.fields([("a", None), ("b", ""), ("c", 0), ("d", False)]))
    assert [line.split() for line in page.splitlines()] == [["c", "0"], ["d", "no"]]


def test_short_ids_are_prefixes_of_the_long_ones():
    full = "kernel-" + "3f" * 32
    assert full.startswith(short(full))
    assert len(short(full)) == len("kernel-") + 12
    assert short("digits-1") == "digits-1"
