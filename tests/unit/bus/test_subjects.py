"""Subjects and streams: every declared subject has exactly one stream and known payload types."""

from __future__ import annotations

import pytest
from google.protobuf.descriptor_pool import Default

from esper_core.bus import subjects
from esper_core.errors import InvalidInput


@pytest.mark.parametrize("subject", subjects.SUBJECTS, ids=lambda subject: subject.name)
def test_every_subject_lies_on_its_one_stream_and_its_types_exist(subject: subjects.Subject) -> None:
    full = subject.of("run-1") if subject.per_run else subject.of()
    holders = [s for s in subjects.STREAMS if any(subjects.matches(pattern, full) for pattern in s.subjects)]
    assert holders == [subject.stream]
    assert subjects.stream_of(full) is subjects.stream_of(subject.all) is subject.stream
    assert subjects.find(full) is subjects.find(subject.all) is subject
    assert subjects.matches(subject.all, full)
    for name in subject.types:
        Default().FindMessageTypeByName(name)


def test_orders_and_facts_are_never_shed() -> None:
    shed = {subject.name for subject in subjects.SUBJECTS if subject.stream.shed}
    assert shed == {"telemetry.seed.health"}


@pytest.mark.parametrize(
    ("pattern", "subject", "caught"),
    [
        ("a.b", "a.b", True),
        ("a.*", "a.b", True),
        ("a.*", "a.b.c", False),
        ("a.*", "a", False),
        ("a.>", "a.b.c", True),
        ("a.>", "a", False),
        ("*.b", "a.b", True),
        ("a.b", "a.c", False),
        ("a.b.c", "a.b", False),
    ],
)
def test_patterns_match_as_the_server_matches(pattern: str, subject: str, caught: bool) -> None:
    assert subjects.matches(pattern, subject) is caught


@pytest.mark.parametrize("run", ["", "a.b", "*", ">", "A", "x" * 64, "a b"])
def test_a_run_that_would_change_the_subject_is_refused(run: str) -> None:
    with pytest.raises(InvalidInput):
        subjects.EPOCH_EVENTS.of(run)


def test_what_is_unknown_is_refused_with_a_hint() -> None:
    with pytest.raises(InvalidInput):
        subjects.KERNEL_READY.of("run-1")
    with pytest.raises(InvalidInput) as caught:
        subjects.find("esper.compilation.kernel.redy")
    assert caught.value.hint == "did you mean 'compilation.kernel.ready'?"
    with pytest.raises(InvalidInput):
        subjects.stream_of("elsewhere.>")
