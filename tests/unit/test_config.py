"""Files, variables and refusals."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, SecretStr

from esper_core.config import MAX_BYTES, Endpoints, PlatformConfig, Section, load, parse_yaml, read_endpoints
from esper_core.errors import Corrupt, InvalidInput, NotFound


class Rate(Section):
    initial: float = Field(0.1, gt=0, description="learning rate at the first step, above 0")
    schedule: tuple[int, ...] = ()


class Run(Section):
    name: str = "run"
    token: SecretStr | None = None
    rate: Rate = Rate()
    rates: dict[str, Rate] = Field(default_factory=dict)


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in list(os.environ):
        if key.startswith("ESPER_"):
            monkeypatch.delenv(key)


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_nothing_gives_the_defaults() -> None:
    assert load(Run) == Run()
    assert load(PlatformConfig).data_dir == Path("~/.esper").expanduser()


def test_a_file_and_a_mapping_mean_the_same(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\nrate:\n  initial: 1e-3\n  schedule: [1, 2]\n")
    same = load(Run, {"name": "a", "rate": {"initial": 0.001, "schedule": [1, 2]}})
    assert load(Run, path) == load(Run, str(path)) == same
    assert load(Run, write(tmp_path, "")) == Run()


def test_the_environment_lies_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "name: a\nrate: {initial: 0.5, schedule: [9]}\n")
    monkeypatch.setenv("ESPER_RATE__INITIAL", "0.25")
    monkeypatch.setenv("ESPER_TOKEN", "[1")
    monkeypatch.setenv("ESPER_SOMETHING_ELSE", "is another program's")
    found = load(Run, path)
    assert (found.name, found.rate) == ("a", Rate(initial=0.25, schedule=(9,)))
    assert found.token is not None
    assert found.token.get_secret_value() == "[1"
    monkeypatch.setenv("ESPER_RATE__SCHEDULE", "[3, 4]")
    assert load(Run, path).rate.schedule == (3, 4)
    monkeypatch.setenv("OTHER_RATE__INITIAL", "0.75")
    assert load(Run, path, env_prefix="OTHER_").rate.initial == 0.75


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("rate: {inital: 1}", "run.yaml: rate.inital is no setting", "did you mean 'initial'?"),
        ("rates: {warm: {schedul: []}}", "rates.warm.schedul is no setting", "did you mean 'schedule'?"),
        ("rate: {initial: -1, zzz: 1}", "rate.initial: Input should be greater than 0 (got '-1')", "known: initial"),
        ("rate: {initial: -1}", "rate.initial: Input should be greater than 0 (got '-1')", "learning rate at the"),
        ("rate: [1\nname: x", "run.yaml, line 2, column 5: expected ',' or ']'", "check indentation"),
        ("name: a\nname: b", "run.yaml, line 2, column 1: 'name' is given twice", "check indentation"),
        ("name: &a x\ntoken: *a", "line 2: aliases (*a) are not read", "write the value out"),
        ("name: !!python/object:os.system x", "line 1: tags (tag:yaml.org,2002:python/object", "plain values"),
        ("[" * 1000, "nested deeper than 32", "shallow"),
        ("name: 2024-13-45", "month must be in 1..12", "quote values"),
        ("- 1", "holds no mapping", "key: value"),
        ("1: 2", "holds no mapping", "key: value"),
        ("name: \x00", "unacceptable character", "UTF-8"),
        (b"name: \xff\xfe", "not UTF-8 (byte 6)", "UTF-8"),
        ("#" * (MAX_BYTES + 1), "larger than 256 KiB", "small file"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_place_and_hint(
    tmp_path: Path, text: str | bytes, message: str, hint: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        load(Run, write(tmp_path, text))
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("variable", "value", "message", "hint"),
    [
        ("ESPER_RATE__INITAL", "1", "ESPER_RATE__INITAL is no setting", "did you mean 'initial'?"),
        ("ESPER_RATE__INITIAL", "fast", "ESPER_RATE__INITIAL: Input should be a valid number", "learning rate"),
        ("ESPER_RATE__SCHEDULE", "[1,", "", ""),
        ("ESPER_RA_TE", "1", "ESPER_RA_TE is no setting", "did you mean ESPER_RATE?"),
    ],
)
def test_a_wrong_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str, hint: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidInput) as caught:
        load(Run)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_secret_is_not_repeated_in_a_refusal() -> None:
    with pytest.raises(InvalidInput) as caught:
        load(Run, {"token": ["canary"], "rates": {"x": "canary"}})
    assert "token" in caught.value.message
    assert "canary" not in caught.value.message + caught.value.hint


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"absent\.yaml"):
        load(Run, tmp_path / "absent.yaml")
    with pytest.raises(InvalidInput, match="cannot be read"):
        load(Run, tmp_path)


@given(st.text(alphabet=st.sampled_from("ab01:-[]{}!*&|>%@`\"'#,?=<~. \n\t\\x_eE+") | st.characters(), max_size=60))
def test_no_text_does_worse_than_be_refused(text: str) -> None:
    with contextlib.suppress(InvalidInput):  # anything else fails
        parse_yaml(text, "it")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
def test_no_value_does_worse_than_be_refused(value: object) -> None:
    for whole in ({"rate": value}, {"rates": value}, {"token": value}, {"rate": {"schedule": value}}):
        with contextlib.suppress(InvalidInput):
            load(Run, whole)


def test_endpoints_missing_and_damaged(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no platform") as caught:
        read_endpoints(tmp_path)
    assert "esperctl up" in caught.value.hint
    (tmp_path / "endpoints.json").write_text('{"grpc_address": "canary"}')
    with pytest.raises(Corrupt, match="damaged") as damaged:
        read_endpoints(tmp_path)
    assert "canary" not in damaged.value.message


def test_endpoints_do_not_show_their_secrets() -> None:
    secrets = {"postgres_dsn": SecretStr("canary"), "s3_secret_key": SecretStr("canary")}
    found = Endpoints.model_construct(**secrets)  # type: ignore[call-arg]
    assert "canary" not in repr(found) + found.model_dump_json()
