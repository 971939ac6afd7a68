"""Whose signature counts, and the two-party rule: a kernel runs only when a build key and a validation key agree on it.

Time is the caller's clock: an expiry protects against a key used after its day only as far as that clock is right.
Whoever can write the trust list decides everything; keep it where only its owner can write. Free of torch.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from esper_core.clock import SYSTEM, Clock
from esper_core.errors import InvalidInput, NotFound, Untrusted
from esper_core.ids import sha256
from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.record import KernelStatus
from esper_core.kernel.sign import PREDICATES, Attestation, Role, Statement, check_signature, key_id

MAX_BYTES = 1 << 20
REFETCH = "fetch the kernel and its statements again"


class TrustedKey(BaseModel):
    """One listed key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key_id: str = Field(pattern=r"^[0-9a-f]{16}$")
    role: Role
    """The only kind of statement it may make."""
    public_key_pem: str
    not_after: AwareDatetime | None = None
    """After this moment its signatures no longer count; None for never."""
    revoked: bool = False

    @model_validator(mode="after")
    def _named_rightly(self) -> TrustedKey:
        if key_id(self.public_key_pem) != self.key_id:
            raise InvalidInput(f"key {self.key_id} is not the key its id says", hint="list it with trust_entry()")
        return self


class TrustList(BaseModel):
    """The keys whose statements count. An empty list trusts nobody.

    Raises:
        InvalidInput: from the constructor, when a key is listed twice or under a wrong id.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[TrustedKey, ...] = ()

    @model_validator(mode="after")
    def _no_doubles(self) -> TrustList:
        ids = [key.key_id for key in self.keys]
        if len(set(ids)) != len(ids):
            raise InvalidInput("a key is listed twice", hint="one entry and one role per key")
        return self

    @classmethod
    def load(cls, path: Path) -> TrustList:
        """Read ``trust.json``.

        Raises:
            NotFound: when there is no such file.
            InvalidInput: when it is malformed.
        """
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise NotFound(f"no trust list at {path}", hint="esperctl up makes one, or set its path") from error
        if len(data) > MAX_BYTES:
            raise InvalidInput(f"the trust list {path} is too long", hint=f"at most {MAX_BYTES} bytes")
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"][:4])
            raise InvalidInput(
                f"the trust list {path} is malformed: {where}: {first['msg']}", hint="see TrustList"
            ) from error

    def dump(self) -> str:
        """The file's text."""
        return self.model_dump_json(indent=2) + "\n"

    def find(self, wanted: str, role: Role, now: dt.datetime) -> TrustedKey:
        """The key ``wanted``, if it may speak as ``role`` now.

        Raises:
            Untrusted: when it is unlisted, listed for another role, revoked or expired.
        """
        key = next((key for key in self.keys if key.key_id == wanted), None)
        if key is None:
            raise Untrusted(
                f"key {wanted} is not on the trust list", hint="add it to trust.json if you know whose it is"
            )
        if key.role != role:
            raise Untrusted(
                f"key {wanted} may sign {key.role} statements, not {role}", hint="have the right party sign"
            )
        if key.revoked:
            raise Untrusted(f"key {wanted} is revoked", hint="have the kernel attested anew with a current key")
        if key.not_after is not None and now > key.not_after:
            raise Untrusted(
                f"key {wanted} expired at {key.not_after.isoformat()}", hint="have the kernel attested anew"
            )
        return key


def trust_entry(role: Role, public_key_pem: str, *, not_after: dt.datetime | None = None) -> TrustedKey:
    """The entry that lists a public key under ``role``.

    Raises:
        InvalidInput: when it is no P-256 public key.
    """
    return TrustedKey(key_id=key_id(public_key_pem), role=role, public_key_pem=public_key_pem, not_after=not_after)


def verify(attestation: Attestation, trust: TrustList, role: Role, *, clock: Clock = SYSTEM) -> Statement:
    """The statement inside ``attestation``, if a listed key made it in ``role``; it may be about any kernel.

    Raises:
        Untrusted: when the key does not count, the signature does not hold or the statement is of another kind.
    """
    key = trust.find(attestation.key_id, role, clock.now())
    found = check_signature(attestation, key.public_key_pem)
    if found.predicate_type != PREDICATES[role]:
        raise Untrusted(f"{found.predicate_type[:80]!r} is no {role} statement", hint=f"expected {PREDICATES[role]}")
    return found


def verify_statement(
    manifest: KernelManifest, attestation: Attestation, trust: TrustList, role: Role, *, clock: Clock = SYSTEM
) -> Statement:
    """As :func:`verify`, and the statement is about exactly ``manifest``.

    Raises:
        Untrusted: as :func:`verify`, or when it speaks of another kernel, blob or manifest.
    """
    found = verify(attestation, trust, role, clock=clock)
    subject = found.subject[0]
    if subject.name != manifest.kernel_id or subject.digest != {"sha256": manifest.blob_sha256}:
        raise Untrusted(f"the {role} statement is about {subject.name[:80]}, not {manifest.kernel_id}", hint=REFETCH)
    if found.predicate.get("manifest_sha256") != sha256(manifest.canonical()):
        raise Untrusted(f"the {role} statement does not cover this manifest of {manifest.kernel_id}", hint=REFETCH)
    return found


def verify_kernel(
    manifest: KernelManifest, attestations: Sequence[Attestation], trust: TrustList, *, clock: Clock = SYSTEM
) -> None:
    """Return only when a listed build key and a listed validation key vouch for exactly this manifest and blob digest.

    ``attestations`` are the build's and then the validation's, whose predicate has ``verdict`` = ``"VALIDATED"``. The
    blob itself is compared with that digest by :func:`esper_core.kernel.pack.unpack`.

    Raises:
        Corrupt: when the manifest's ids do not follow from its contents.
        Untrusted: when a statement is missing, surplus, wrong, by a key that does not count, or says anything but
            VALIDATED.
    """
    manifest.check()
    if len(attestations) != 2:
        raise Untrusted(
            f"{manifest.kernel_id} carries {len(attestations)} statements",
            hint="one of its build, one of its validation",
        )
    build, validation = attestations
    verify_statement(manifest, build, trust, "build", clock=clock)
    verdict = verify_statement(manifest, validation, trust, "validation", clock=clock).predicate.get("verdict")
    if verdict != KernelStatus.VALIDATED.name:
        raise Untrusted(f"{manifest.kernel_id} was measured and not validated", hint="choose another kernel")
