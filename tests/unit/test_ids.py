"""Names: sortable for what happens, by content for what is, and safe wherever they are put."""

from __future__ import annotations

import hashlib
import re
import time
import uuid

import hypothesis.strategies as st
import pytest
from hypothesis import given

from esper_core.errors import InvalidInput
from esper_core.ids import DIGEST, check_name, content_id, new_id, sha256


def test_ids_are_version_seven_uuids_of_now() -> None:
    before = int(time.time() * 1000)
    made = [uuid.UUID(new_id()) for _ in range(200)]
    after = int(time.time() * 1000)
    assert len(set(made)) == 200
    for each in made:
        assert each.version == 7
        assert each.variant == uuid.RFC_4122
        assert before <= each.int >> 80 <= after


def test_ids_sort_by_the_millisecond_they_were_made_in(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for millisecond in range(5):
        monkeypatch.setattr(time, "time", lambda now=1.7e9 + millisecond / 1000: now)
        made.append(new_id())
    assert made == sorted(made)


@given(st.binary(), st.binary())
def test_content_is_named_by_its_digest_alone(a: bytes, b: bytes) -> None:
    assert sha256(a) == hashlib.sha256(a).hexdigest()
    name = content_id("blueprint", a)
    assert DIGEST.fullmatch(name)
    assert name == f"blueprint-{hashlib.sha256(a).hexdigest()}"
    assert (name == content_id("blueprint", b)) == (a == b)


@given(st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True))
def test_good_names_pass(name: str) -> None:
    assert check_name(name, "run") == name


BAD = ["", "-x", "Run", "a.b", "a/b", "../x", "a b", "a*", "a>", "é", "x" * 64, "a\n", "a\x00", "run$"]


@pytest.mark.parametrize("name", BAD)
def test_bad_names_are_refused_with_a_hint(name: str) -> None:
    with pytest.raises(InvalidInput, match="run") as caught:
        check_name(name, "run")
    assert caught.value.hint


@given(st.text(max_size=70))
def test_whatever_passes_is_safe_in_a_subject_a_path_and_a_url(name: str) -> None:
    try:
        check_name(name, "run")
    except InvalidInput:
        return
    assert re.fullmatch(r"[a-z0-9-]+", name)
    assert not name.startswith("-")
