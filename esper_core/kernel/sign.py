"""Signed statements about kernels and files of them: in-toto statements in DSSE envelopes, ECDSA P-256.

Proves that whoever holds a private key said exactly these bytes. Whether that key counts, and whether the statement
fits a given kernel, is :mod:`esper_core.kernel.trust`'s to decide; how private keys are kept is the caller's. Free of
torch.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from esper_core.blueprint.interface import canonical_json
from esper_core.errors import InvalidInput, Untrusted
from esper_core.ids import sha256
from esper_core.kernel.manifest import KernelManifest

Role = Literal["build", "validation", "library"]

PAYLOAD_TYPE = "application/vnd.in-toto+json"
PREDICATES: Mapping[Role, str] = {
    "build": "urn:esper:attestation:build:v1",
    "validation": "urn:esper:attestation:validation:v1",
    "library": "urn:esper:attestation:library:v1",
}
"""Predicate type of each role's statements."""
MAX_PAYLOAD = 65536


def _from_base64(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return base64.b64decode(value.replace("-", "+").replace("_", "/"), validate=True)
    except binascii.Error as error:
        raise ValueError("not base64") from error


Bytes = Annotated[
    bytes,
    BeforeValidator(_from_base64),
    PlainSerializer(lambda data: base64.b64encode(data).decode(), return_type=str, when_used="json"),
]
"""Bytes that are base64 text in JSON, as the protobuf JSON mapping has them."""


class Attestation(BaseModel):
    """A DSSE envelope with one signature; field names equal those of ``esper.core.v1.Attestation``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    payload_type: str = Field(min_length=1, max_length=120)
    payload: Bytes = Field(min_length=2, max_length=MAX_PAYLOAD)
    """The in-toto statement, canonical JSON."""
    key_id: str = Field(pattern=r"^[0-9a-f]{16}$")
    """Names the signing key."""
    signature: Bytes = Field(min_length=8, max_length=256)
    """ECDSA P-256 over the pre-authentication encoding, DER."""


class Subject(BaseModel):
    """What a statement is about."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """The kernel id."""
    digest: dict[str, str]
    """``sha256`` of the kernel's blob."""


class Statement(BaseModel):
    """An in-toto statement."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    type: Literal["https://in-toto.io/Statement/v1"] = Field(default="https://in-toto.io/Statement/v1", alias="_type")
    subject: tuple[Subject, ...] = Field(min_length=1, max_length=1)
    predicate_type: str = Field(alias="predicateType")
    predicate: dict[str, Any]

    def canonical(self) -> bytes:
        return canonical_json(self.model_dump(mode="json", by_alias=True))


def statement(manifest: KernelManifest, role: Role, predicate: Mapping[str, Any]) -> Statement:
    """A statement about ``manifest`` as a whole; ``predicate`` is what its maker has to say, for example a verdict."""
    return Statement(
        subject=(Subject(name=manifest.kernel_id, digest={"sha256": manifest.blob_sha256}),),
        predicate_type=PREDICATES[role],
        predicate={**predicate, "manifest_sha256": sha256(manifest.canonical())},
    )


def generate_key() -> bytes:
    """A new ECDSA P-256 private key: PKCS8 PEM, unencrypted; keep it in a file of mode 0600."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public_pem(private_pem: bytes) -> str:
    """The public half of a private key, PEM.

    Raises:
        InvalidInput: when it is no P-256 private key.
    """
    key = _private(private_pem).public_key()
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def key_id(public: str) -> str:
    """First 16 hex digits of the SHA-256 over the DER SubjectPublicKeyInfo.

    Raises:
        InvalidInput: when it is no P-256 public key in PEM.
    """
    der = _public(public).public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return sha256(der)[:16]


def sign(what: Statement, private_pem: bytes) -> Attestation:
    """``what``, signed.

    Raises:
        InvalidInput: when the key is no P-256 private key, or the statement is longer than 64 KiB.
    """
    payload = what.canonical()
    if len(payload) > MAX_PAYLOAD:
        raise InvalidInput(f"a statement of {len(payload)} bytes is too long", hint=f"at most {MAX_PAYLOAD} bytes")
    signature = _private(private_pem).sign(encoding(PAYLOAD_TYPE, payload), ec.ECDSA(hashes.SHA256()))
    return Attestation(
        payload_type=PAYLOAD_TYPE, payload=payload, key_id=key_id(public_pem(private_pem)), signature=signature
    )


def check_signature(attestation: Attestation, public: str) -> Statement:
    """The statement inside, once the signature over it holds.

    Raises:
        Untrusted: when the signature is not by this key over these bytes, or the payload is no in-toto statement.
    """
    try:
        _public(public).verify(
            attestation.signature,
            encoding(attestation.payload_type, attestation.payload),
            ec.ECDSA(hashes.SHA256()),
        )
    except InvalidSignature as error:
        hint = "the attestation was altered or signed by another key: fetch it again"
        raise Untrusted(f"the signature by key {attestation.key_id} does not hold", hint=hint) from error
    if attestation.payload_type != PAYLOAD_TYPE:
        raise Untrusted(f"payload type {attestation.payload_type!r} is no statement", hint=f"expected {PAYLOAD_TYPE}")
    try:
        return Statement.model_validate_json(attestation.payload)
    except ValidationError as error:
        raise Untrusted("the signed payload is no in-toto statement", hint="have the kernel attested anew") from error


def encoding(payload_type: str, payload: bytes) -> bytes:
    """DSSE pre-authentication encoding: what is really signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _private(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidInput("not a private key", hint="an unencrypted PKCS8 PEM is needed") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidInput("not an ECDSA P-256 key", hint="generate one with esper_core.kernel.sign.generate_key")
    return key


def _public(pem: str) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidInput("not a public key", hint="a SubjectPublicKeyInfo PEM is needed") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidInput("not an ECDSA P-256 key", hint="only P-256 keys can be trusted")
    return key
