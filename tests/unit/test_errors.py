"""The error tree: what each becomes on the wire and as an exit code, and hints that help."""

from __future__ import annotations

import re

import grpc
import hypothesis.strategies as st
import pytest
from hypothesis import given

from esper_core import errors
from esper_core.errors import Conflict, EsperError, IllegalTransition, Internal, InvalidInput, every, nearest


@pytest.mark.parametrize("cls", every())
def test_every_status_is_one_of_grpcs(cls: type[EsperError]) -> None:
    assert cls.status in grpc.StatusCode.__members__
    assert 0 < cls.exit_code < 128


def test_the_docstrings_table_is_true() -> None:
    rows = re.findall(r"[├└│]\S*\s+[└─ ]*(\w+)\s+([A-Z_]+)\s+(\d+)", errors.__doc__ or "")
    table = {name: (status, int(code)) for name, status, code in rows}
    assert table == {cls.__name__: (cls.status, cls.exit_code) for cls in every()[1:]}


def test_exit_codes_tell_errors_apart_except_kin() -> None:
    codes: dict[int, set[str]] = {}
    for cls in every()[1:]:
        codes.setdefault(cls.exit_code, set()).add(cls.__name__)
    shared = {frozenset(names) for names in codes.values() if len(names) > 1}
    kin = (("Conflict", "IllegalTransition"), ("InvalidInput", "Refused"), ("Unauthenticated", "Forbidden"))
    assert shared == {frozenset(names) for names in kin}


def test_every_lists_each_class_once_roots_first() -> None:
    found = every()
    assert found[0] is EsperError
    assert len(found) == len(set(found))
    assert found.index(Conflict) < found.index(IllegalTransition)
    assert {cls.__name__ for cls in found} == {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, EsperError)
    }


def test_an_error_carries_message_and_hint() -> None:
    error = InvalidInput("width is 0", hint="use 1 or more")
    assert (str(error), error.message, error.hint) == ("width is 0", "width is 0", "use 1 or more")
    assert Internal("broken").hint == ""


@pytest.mark.parametrize(
    ("word", "known", "hint"),
    [
        ("digts", ["digits", "wine"], "did you mean 'digits'?"),
        ("xyz", ["wine", "digits"], "known: digits, wine"),
        ("anything", [], ""),
    ],
)
def test_the_nearest_name_is_offered(word: str, known: list[str], hint: str) -> None:
    assert nearest(word, known) == hint


@given(st.lists(st.text("abcdefgh", min_size=4, max_size=12), min_size=1, unique=True), st.data())
def test_a_known_name_is_its_own_nearest(known: list[str], data: st.DataObject) -> None:
    word = data.draw(st.sampled_from(known))
    assert nearest(word, known) == f"did you mean {word!r}?"
