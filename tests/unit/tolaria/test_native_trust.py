"""Native code runs only for whom it was signed: this kernel, this machine, this torch, by a listed build key, and asked for."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest

from esper_core.config import load
from esper_core.errors import Corrupt, InvalidInput, Untrusted
from esper_core.ids import sha256
from esper_core.kernel.native import NativeRecord, convention, native_statement
from esper_core.kernel.sign import Statement, generate_key, public_pem, sign
from esper_core.kernel.trust import TrustList, trust_entry
from services.sandbox import target
from services.tolaria.config import TolariaConfig, read_run
from services.tolaria.native import trusted

KERNEL = "kernel-" + "1" * 64
BLOB = b"machine code"
FORGE, JUDGE, STRANGER = generate_key(), generate_key(), generate_key()
TRUST = TrustList(keys=(trust_entry("build", public_pem(FORGE)), trust_entry("validation", public_pem(JUDGE))))


def papers(**changes: Any) -> NativeRecord:
    fields = {
        "kernel_id": KERNEL,
        "target": target(),
        "toolchain": convention(),
        "blob_sha256": sha256(BLOB),
        "blob_bytes": len(BLOB),
        "rows": 64,
        "step_ratio": 0.5,
    }
    return NativeRecord.model_validate({**fields, **changes})


def test_what_is_signed_for_here_is_trusted() -> None:
    trusted(KERNEL, papers(), sign(native_statement(papers()), FORGE), BLOB, TRUST)


@pytest.mark.parametrize(
    "changes", [{"target": "another/machine"}, {"toolchain": "torch/1.0"}, {"kernel_id": "kernel-" + "2" * 64}]
)
def test_what_is_for_another_kernel_machine_or_torch_is_not(changes: dict[str, str]) -> None:
    other = papers(**changes)
    with pytest.raises(Untrusted):
        trusted(KERNEL, other, sign(native_statement(other), FORGE), BLOB, TRUST)


@pytest.mark.parametrize("key", [JUDGE, STRANGER])
def test_only_a_listed_build_key_counts(key: bytes) -> None:
    with pytest.raises(Untrusted):
        trusted(KERNEL, papers(), sign(native_statement(papers()), key), BLOB, TRUST)


def test_a_revoked_or_expired_key_does_not_count() -> None:
    statement = sign(native_statement(papers()), FORGE)
    entry = trust_entry("build", public_pem(FORGE))
    for change in ({"revoked": True}, {"not_after": dt.datetime(2020, 1, 1, tzinfo=dt.UTC)}):
        with pytest.raises(Untrusted):
            trusted(KERNEL, papers(), statement, BLOB, TrustList(keys=(entry.model_copy(update=change),)))


def test_a_statement_covers_every_field_and_every_byte() -> None:
    statement = sign(native_statement(papers()), FORGE)
    for change in ({"rows": 65}, {"step_ratio": 0.4}, {"blob_bytes": 1}, {"blob_sha256": sha256(b"other")}):
        with pytest.raises(Untrusted):
            trusted(KERNEL, papers(**change), statement, BLOB, TRUST)
    for blob in (b"machine_code", BLOB + b"x", b""):
        with pytest.raises(Corrupt):
            trusted(KERNEL, papers(), statement, blob, TRUST)
    altered = statement.model_copy(update={"signature": statement.signature[:-1] + b"\x00"})
    with pytest.raises(Untrusted):
        trusted(KERNEL, papers(), altered, BLOB, TRUST)


def test_a_statement_about_the_kernel_itself_does_not_vouch_for_code() -> None:
    said = native_statement(papers())
    build = Statement(
        subject=said.subject, predicate_type="urn:esper:attestation:build:v1", predicate=dict(said.predicate)
    )
    with pytest.raises(Untrusted):
        trusted(KERNEL, papers(), sign(build, FORGE), BLOB, TRUST)


def test_a_run_trusts_native_code_only_when_told_to() -> None:
    assert load(TolariaConfig, {}).morphogenetic.native == "off"
    assert load(TolariaConfig, {"morphogenetic": {"native": "trusted"}}).morphogenetic.native == "trusted"
    for spelled in ("off", "trusted"):
        assert read_run("digits", [f"morphogenetic.native={spelled}"]).morphogenetic.native == spelled
    with pytest.raises(InvalidInput):
        load(TolariaConfig, {"morphogenetic": {"native": "yes"}})
