"""The two-party rule: every way in which a kernel could be passed off as trusted, refused."""

import base64
import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_core.errors import Corrupt, InvalidInput, NotFound, Untrusted
from esper_core.ids import sha256
from esper_core.kernel.sign import (
    PAYLOAD_TYPE,
    Attestation,
    Statement,
    encoding,
    generate_key,
    key_id,
    public_pem,
    sign,
    statement,
)
from esper_core.kernel.trust import TrustedKey, TrustList, trust_entry, verify, verify_kernel
from esper_core.pb.esper.core.v1 import kernel_pb2
from esper_core.rpc.convert import from_proto, to_proto


class Moment:
    """A clock that stands still."""

    def __init__(self, now: dt.datetime) -> None:
        self._now = now

    def now(self) -> dt.datetime:
        return self._now

    def monotonic(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("nothing here waits")


def refused(kernel: Any, attestations: list[Attestation], trust: TrustList | None = None) -> str:
    with pytest.raises(Untrusted) as caught:
        verify_kernel(kernel.manifest, attestations, trust or kernel.trust)
    assert caught.value.hint
    return caught.value.message


def relisted(trust: TrustList, role: str, **changes: Any) -> TrustList:
    keys = [key.model_copy(update=changes) if key.role == role else key for key in trust.keys]
    return TrustList(keys=tuple(keys))


def test_a_kernel_with_both_statements_is_trusted(kernel: Any) -> None:
    verify_kernel(kernel.manifest, kernel.attestations, kernel.trust)


def test_statements_survive_the_wire_and_json(kernel: Any) -> None:
    sent = to_proto(kernel.build, kernel_pb2.Attestation).SerializeToString()
    assert from_proto(kernel_pb2.Attestation.FromString(sent), Attestation) == kernel.build
    assert Attestation.model_validate_json(kernel.build.model_dump_json()) == kernel.build
    assert base64.b64decode(json.loads(kernel.build.model_dump_json())["payload"]) == kernel.build.payload


def test_what_is_signed_is_the_dsse_encoding_of_an_in_toto_statement(kernel: Any) -> None:
    # The example of the DSSE specification.
    assert encoding("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )
    body = json.loads(kernel.validation.payload)
    assert body["_type"] == "https://in-toto.io/Statement/v1"
    assert body["subject"] == [{"name": kernel.manifest.kernel_id, "digest": {"sha256": sha256(kernel.blob)}}]
    assert kernel.validation.payload_type == PAYLOAD_TYPE


def test_missing_and_surplus_statements(kernel: Any) -> None:
    for given_ in ([], [kernel.build], [kernel.validation], [*kernel.attestations, kernel.build]):
        assert "statements" in refused(kernel, given_)


def test_one_party_cannot_stand_for_both(kernel: Any) -> None:
    assert "not validation" in refused(kernel, [kernel.build, kernel.build])
    assert "not build" in refused(kernel, [kernel.validation, kernel.validation])
    posed = sign(statement(kernel.manifest, "validation", {"verdict": "VALIDATED"}), kernel.build_key)
    assert "not validation" in refused(kernel, [kernel.build, posed])
    crossed = sign(statement(kernel.manifest, "build", {"verdict": "VALIDATED"}), kernel.validation_key)
    assert "is no validation statement" in refused(kernel, [kernel.build, crossed])


def test_a_verdict_other_than_validated(kernel: Any) -> None:
    for predicate in ({"verdict": "REJECTED"}, {"verdict": 2}, {}):
        said = sign(statement(kernel.manifest, "validation", predicate), kernel.validation_key)
        assert "not validated" in refused(kernel, [kernel.build, said])


def test_unlisted_revoked_and_expired_keys(kernel: Any) -> None:
    assert "not on the trust list" in refused(kernel, kernel.attestations, TrustList())
    stranger = sign(statement(kernel.manifest, "build", {}), generate_key())
    assert "not on the trust list" in refused(kernel, [stranger, kernel.validation])
    for role in ("build", "validation"):
        assert "revoked" in refused(kernel, kernel.attestations, relisted(kernel.trust, role, revoked=True))
        end = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)
        ending = relisted(kernel.trust, role, not_after=end)
        verify_kernel(kernel.manifest, kernel.attestations, ending, clock=Moment(end))
        with pytest.raises(Untrusted, match="expired"):
            verify_kernel(kernel.manifest, kernel.attestations, ending, clock=Moment(end + dt.timedelta(seconds=1)))


def test_a_borrowed_key_id(kernel: Any) -> None:
    stranger = generate_key()
    forged = sign(statement(kernel.manifest, "build", {}), stranger).model_copy(update={"key_id": kernel.build.key_id})
    assert "does not hold" in refused(kernel, [forged, kernel.validation])


def test_statements_about_another_kernel(kernel: Any, other: Any) -> None:
    assert "is about" in refused(kernel, [other.build, kernel.validation])
    assert "is about" in refused(kernel, [kernel.build, other.validation])
    # Its manifest and blob under another name.
    good = statement(kernel.manifest, "build", {})
    subject = good.subject[0].model_copy(update={"name": other.manifest.kernel_id})
    renamed = sign(good.model_copy(update={"subject": (subject,)}), kernel.build_key)
    assert "is about" in refused(kernel, [renamed, kernel.validation])
    # A swapped digest under the right name.
    subject = good.subject[0].model_copy(update={"digest": {"sha256": other.manifest.blob_sha256}})
    swapped = sign(good.model_copy(update={"subject": (subject,)}), kernel.build_key)
    assert "is about" in refused(kernel, [swapped, kernel.validation])
    weak = good.subject[0].model_copy(update={"digest": {**good.subject[0].digest, "md5": "0"}})
    assert "is about" in refused(
        kernel, [sign(good.model_copy(update={"subject": (weak,)}), kernel.build_key), kernel.validation]
    )


ALTERED: list[dict[str, Any]] = [
    {"pipeline": "fast"},
    {"seed": 2},
    {"parameters": 1},
    {"flops": 1},
    {"blob_bytes": 1},
    {"provenance": {"compiler": "another"}},
]


@pytest.mark.parametrize("change", ALTERED)
def test_an_altered_manifest_is_no_longer_covered(kernel: Any, change: dict[str, Any]) -> None:
    altered = type(kernel.manifest).model_validate({**kernel.manifest.model_dump(), **change})
    with pytest.raises(Untrusted, match="does not cover"):
        verify_kernel(altered, kernel.attestations, kernel.trust)


def test_a_manifest_whose_ids_lie_is_corrupt_even_when_unvalidated(kernel: Any, other: Any) -> None:
    lying = kernel.manifest.model_copy(update={"blob_sha256": other.manifest.blob_sha256})
    with pytest.raises(Corrupt):
        verify_kernel(lying, kernel.attestations, kernel.trust)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_every_flipped_bit_of_a_statement_is_noticed(kernel: Any, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, 1))
    field = data.draw(st.sampled_from(["payload", "signature"]))
    old = bytearray(getattr(kernel.attestations[position], field))
    at = data.draw(st.integers(0, len(old) - 1))
    old[at] ^= 1 << data.draw(st.integers(0, 7))
    altered = kernel.attestations
    altered[position] = altered[position].model_copy(update={field: bytes(old)})
    refused(kernel, altered)


def test_the_payload_type_is_signed_too(kernel: Any) -> None:
    renamed = kernel.build.model_copy(update={"payload_type": "application/json"})
    assert "does not hold" in refused(kernel, [renamed, kernel.validation])


@pytest.mark.parametrize(
    "payload", [b"{}", b"[]", b"not json", b'{"_type":"https://in-toto.io/Statement/v1","subject":[]}']
)
def test_a_well_signed_payload_that_is_no_statement(kernel: Any, payload: bytes) -> None:
    key = serialization.load_pem_private_key(kernel.build_key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    signature = key.sign(encoding(PAYLOAD_TYPE, payload), ec.ECDSA(hashes.SHA256()))
    made = kernel.build.model_copy(update={"payload": payload, "signature": signature})
    assert "no in-toto statement" in refused(kernel, [made, kernel.validation])


def test_verify_gives_the_statement(kernel: Any) -> None:
    found = verify(kernel.validation, kernel.trust, "validation")
    assert isinstance(found, Statement)
    assert found.predicate["verdict"] == "VALIDATED"


def test_a_trust_list_is_read_back_as_written(kernel: Any, tmp_path: Path) -> None:
    path = tmp_path / "trust.json"
    path.write_text(kernel.trust.dump())
    assert TrustList.load(path) == kernel.trust
    entry = json.loads(path.read_text())["keys"][0]
    assert {"key_id", "role", "public_key_pem", "revoked"} <= entry.keys()


def test_bad_trust_lists_are_refused_with_a_hint(kernel: Any, tmp_path: Path) -> None:
    key = json.loads(kernel.trust.keys[0].model_dump_json())
    other = kernel.trust.keys[1].public_key_pem
    path = tmp_path / "trust.json"
    with pytest.raises(NotFound):
        TrustList.load(path)
    for keys in (
        [key, key],
        [{**key, "key_id": "0" * 16}],
        [{**key, "public_key_pem": other}],
        [{**key, "public_key_pem": "nonsense"}],
        [{**key, "role": "admin"}],
        [{**key, "revoekd": True}],
        [{**key, "not_after": "2030-01-01T00:00:00"}],
        "nonsense",
    ):
        path.write_text(json.dumps({"keys": keys}))
        with pytest.raises(InvalidInput) as caught:
            TrustList.load(path)
        assert caught.value.hint
    path.write_text("{")
    with pytest.raises(InvalidInput):
        TrustList.load(path)


def test_key_ids_come_from_the_public_key(kernel: Any) -> None:
    pem = public_pem(kernel.build_key)
    der = serialization.load_pem_public_key(pem.encode()).public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert key_id(pem) == sha256(der)[:16] == kernel.build.key_id
    assert isinstance(trust_entry("build", pem), TrustedKey)


def test_only_p256_keys_are_taken(kernel: Any) -> None:
    pkcs8 = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    for key in (ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1())):
        with pytest.raises(InvalidInput, match="P-256"):
            sign(statement(kernel.manifest, "build", {}), key.private_bytes(*pkcs8))
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        with pytest.raises(InvalidInput, match="P-256"):
            trust_entry("build", public.decode())
    for junk in (b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"):
        with pytest.raises(InvalidInput):
            public_pem(junk)


def test_a_statement_has_a_largest_size(kernel: Any) -> None:
    with pytest.raises(InvalidInput, match="too long"):
        sign(statement(kernel.manifest, "build", {"log": "x" * 70_000}), kernel.build_key)
