"""Width expressions: right values for the grammar, refusal of everything else."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_core.blueprint import expression
from esper_core.errors import InvalidInput

SYMBOLS = {"width": 8, "in_width": 12, "out_width": 10, "hidden_width": 3}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("width", 8),
        (" 2*width + in_width // 5 ", 18),
        ("max(4, hidden_width, width - 3)", 5),
        ("min(width, (out_width - 1) * 2)", 8),
        ("in_width - width * 2", -4),
    ],
)
def test_values(text: str, value: int) -> None:
    assert expression.evaluate(text, SYMBOLS) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "__import__('os').system('true')",
        "width.__class__",
        "width ** 9",
        "width / 2",
        "-width",
        "1.5",
        "1e9",
        "0x10",
        "1if 1else 2",
        "True",
        "[1]",
        "lambda: 1",
        "width if 1 else 2",
        "max()",
        "max(*width)",
        "max(width, key=1)",
        "print(1)",
        "width width",
        "a := 1",
        "width\n",
        "width\x00",
        "(" * 60 + "1" + ")" * 60 + "+" + "(" * 3,
        "+".join("1" for _ in range(40)),
        "1" + "0" * 200,
        "９",
        "unknown",
        "width // (hidden_width - 3)",
        "*".join(["1000000"] * 3),
        "max(1, " * 17 + "1" + ")" * 17,
    ],
)
def test_nasty_things_are_refused_with_a_hint(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        expression.evaluate(text, SYMBOLS)
    assert caught.value.hint


@given(st.text(max_size=140))
def test_any_text_gives_an_integer_or_a_refusal(text: str) -> None:
    with contextlib.suppress(InvalidInput):
        assert type(expression.evaluate(text, SYMBOLS)) is int


@given(st.text(alphabet="0123456789()+-*/, maxinwdth_", max_size=128))
def test_near_misses_give_a_bounded_integer_or_a_refusal(text: str) -> None:
    try:
        value = expression.evaluate(text, SYMBOLS)
    except InvalidInput:
        return
    assert abs(value) <= expression.MAX_VALUE
    assert value == eval(text, {"__builtins__": {}, "min": min, "max": max}, SYMBOLS)  # noqa: S307 - the reference


def test_checking_knows_names_but_does_no_arithmetic() -> None:
    expression.check("width // 0", SYMBOLS)
    with pytest.raises(InvalidInput, match="unknown symbol 'widht'") as caught:
        expression.check("widht * 2", SYMBOLS)
    assert "width" in caught.value.hint
