"""Log lines: on stderr alone, complete, and without a secret in them."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, SecretStr

from esper_core import log, telemetry

CANARY = "hunter2-canary"


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    before = (log._State.service, log._State.json, log._State.level, list(root.handlers), root.level)
    yield
    log._State.service, log._State.json, log._State.level, root.handlers, level = before
    root.setLevel(level)


def _lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    out, err = capsys.readouterr()
    assert out == ""
    return [json.loads(line) for line in err.splitlines()]


def test_a_line_carries_service_context_and_trace(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("urza", json=True, level="info")
    with telemetry.use() as traceparent, log.context(run_id="r1"):
        log.get("library").info("stored", size=3)
    log.get("library").info("later")
    first, second = _lines(capsys)
    assert first.pop("timestamp").endswith("Z")
    assert first == {
        "event": "stored",
        "size": 3,
        "part": "library",
        "service": "urza",
        "level": "info",
        "run_id": "r1",
        "trace_id": telemetry.trace_id(traceparent),
    }
    assert not {"run_id", "trace_id"} & set(second)


def test_levels_below_are_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("x", json=True, level="warning")
    logger = log.get("x")
    logger.info("no")
    logger.warning("yes")
    log.configure("x", json=True, level="debug")
    logger.debug("also")
    assert [line["event"] for line in _lines(capsys)] == ["yes", "also"]


def test_a_logger_made_before_configure_only_warns(capsys: pytest.CaptureFixture[str]) -> None:
    log._State.level = logging.WARNING
    log.get("x").info("no")
    log.get("x").warning("yes")
    out, err = capsys.readouterr()
    assert out == ""
    assert "yes" in err
    assert "no" not in err.replace("yes", "")


class Config(BaseModel):
    dsn: SecretStr = SecretStr(CANARY)


@pytest.mark.parametrize("json_", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {"password": CANARY},
        {"nats_password": CANARY},
        {"Authorization": CANARY},
        {"api-key": CANARY},
        {"private_key": CANARY.encode()},
        {"dsn": {"url": CANARY}},
        {"config": {"s3": [{"secret_key": CANARY}]}},
        {"value": SecretStr(CANARY)},
        {"values": [SecretStr(CANARY)]},
        {"config": Config()},
        {"text": f"postgresql://esper:{CANARY}@localhost/esper"},
        {"text": f"nats://{CANARY}@localhost"},
        {"text": f"nats://u:p/{CANARY}@x@localhost"},
        {"text": f"password={CANARY} host=x"},
        {"text": f'{{"secret_key": "{CANARY}"}}'},
        {"text": f"Authorization: Bearer {CANARY}"},
        {"text": f"-----BEGIN EC PRIVATE KEY-----\n{CANARY}\n-----END EC PRIVATE KEY-----"},
        {"text": f"-----BEGIN PRIVATE KEY-----\n{CANARY}"},
        {"error": ValueError(f"cannot dial amqp://u:{CANARY}@host")},
        {"data": CANARY.encode()},
    ],
    ids=str,
)
def test_no_secret_is_written(capsys: pytest.CaptureFixture[str], json_: bool, fields: dict[str, Any]) -> None:
    log.configure("x", json=json_, level="info")
    log.get("x").info("about to connect", **fields)
    with log.context(**fields):
        log.get("x").warning(str(fields.get("text", "")))
    out, err = capsys.readouterr()
    assert out == ""
    assert CANARY not in err
    assert "about to connect" in err


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["password", "token", "user_secret", "dsn", "AWS_SECRET_ACCESS_KEY"]),
    st.recursive(
        st.just(CANARY), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
    ),
)
def test_whatever_lies_under_a_secret_key_is_hidden(key: str, value: Any) -> None:
    assert CANARY not in json.dumps(log.redact({"outer": [{key: value}]}))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.binary() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
def test_anything_can_be_written_as_json(value: Any) -> None:
    json.loads(json.dumps(log.redact(value), allow_nan=False))


def test_ordinary_values_are_left_alone() -> None:
    kept = {"url": "http://127.0.0.1:80/a?b=c", "n": 3, "x": 0.5, "none": None, "ok": True, "names": ["a", "b"]}
    assert log.redact(kept) == kept


def test_an_exception_is_written_without_its_secret(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("x", json=True, level="info")
    local = CANARY
    try:
        raise RuntimeError(f"postgres://u:{local}@h is away")
    except RuntimeError:
        log.get("x").exception("failed")
    (line,) = _lines(capsys)
    assert "RuntimeError" in line["exception"]
    assert CANARY not in line["exception"]


def test_a_hostile_value_cannot_forge_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("x", json=False, level="info")
    log.get("x").info("got\n2026-01-01 [error] forged", name="\x1b[31mred\r\n[error] forged")
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "\x1b[31m" not in err


def test_other_libraries_lines_take_the_same_road(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("x", json=True, level="debug")
    log.configure("x", json=True, level="debug")
    logging.getLogger("botocore").warning("100%% of %s", f"https://u:{CANARY}@s3")
    logging.getLogger("botocore").debug("noise")
    (line,) = _lines(capsys)
    assert line["part"] == "botocore"
    assert line["event"] == "100% of https://***@s3"


def test_a_closed_stderr_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    log.configure("x", json=True, level="info")
    with open("/dev/null", "w") as gone:
        monkeypatch.setattr(sys, "stderr", gone)
    log.get("x").info("nobody listens")


@pytest.mark.parametrize("bad", ["", "x", "00-" + "0" * 32 + "-" + "1" * 16 + "-01", "00-" + "a" * 32 + "-" + "b" * 16])
def test_a_malformed_trace_begins_a_new_one(bad: str) -> None:
    assert telemetry.trace_id(bad) == ""
    with telemetry.use(bad) as traceparent:
        assert telemetry.current() == traceparent != bad
        assert telemetry.trace_id(traceparent)
    assert telemetry.current() == ""


def test_traces_nest() -> None:
    with telemetry.use() as outer:
        with telemetry.use() as inner:
            assert telemetry.current() == inner != outer
        assert telemetry.current() == outer
