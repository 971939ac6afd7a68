"""Names as people type them."""

import pytest

from esper_core.cli.resolve import content_id, one, slot_of, split_seed_id
from esper_core.errors import InvalidInput, NotFound
from esper_core.pb.esper.core.v1.run_pb2 import Run, Slot


def test_an_exact_name_wins_over_longer_ones():
    assert one("digits", ["digits-1", "digits"], "run") == "digits"


def test_a_prefix_that_fits_one_is_enough():
    assert one("dig", ["spirals", "digits"], "run") == "digits"


def test_a_prefix_that_fits_several_is_refused_with_all_of_them():
    with pytest.raises(InvalidInput) as caught:
        one("dig", ["digits-1", "digits-2"], "run")
    assert "digits-1" in caught.value.hint
    assert "digits-2" in caught.value.hint


def test_a_near_miss_is_named():
    with pytest.raises(NotFound) as caught:
        one("digtis", ["digits", "spirals"], "run")
    assert "'digits'" in caught.value.hint


@pytest.mark.parametrize("given", ["3f0c1", "kernel-3f0c1", "3f" * 32, "kernel-" + "3f" * 32])
def test_ids_with_and_without_their_kind(given):
    assert content_id("kernel", given) == "kernel-" + given.removeprefix("kernel-")


@pytest.mark.parametrize("given", ["", "3f0c", "kernel-3f0", "blueprint-3f0c1", "XYZ12345", "3f" * 33, "../etc"])
def test_what_is_no_id_is_refused_before_anyone_is_asked(given):
    with pytest.raises(InvalidInput):
        content_id("kernel", given)


def run(*slots: str) -> Run:
    return Run(run_id="r", slots=[Slot(slot=slot) for slot in slots])


def test_the_only_slot_needs_no_name():
    assert slot_of(run("fc1:fc2"), None) == "fc1:fc2"


def test_of_several_slots_one_must_be_named():
    with pytest.raises(InvalidInput) as caught:
        slot_of(run("fc1:fc2", "fc2:fc3"), None)
    assert "fc2:fc3" in caught.value.hint
    assert slot_of(run("fc1:fc2", "fc2:fc3"), "fc2") == "fc2:fc3"


def test_a_run_without_slots_says_so():
    with pytest.raises(NotFound, match="no slots"):
        slot_of(run(), None)


def test_seed_ids():
    assert split_seed_id("digits-1/fc1:fc2/3") == ("digits-1", "fc1:fc2", 3)
    assert split_seed_id("fc1:fc2") is None
    assert split_seed_id("a/b/c") is None
