"""Identity on one machine: a private CA, a certificate per principal, and the keys that sign kernels.

All keys are ECDSA P-256 (gRPC refuses Ed25519 certificates). A client certificate names its principal by the URI
``spiffe://esper/<principal>`` and may only dial; the server's may only listen. Certificates near their end, or without
the configured host name, are issued anew at start; the CA and the signing keys stay, for what they signed stays.

Does not protect against a reader of the data directory: the CA's key lies there too (``secrets/ca.key``, 0600).
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from collections.abc import Mapping
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from esper_core.errors import Corrupt
from esper_core.kernel.sign import Role, generate_key, public_pem
from esper_core.kernel.trust import TrustList, trust_entry
from esper_core.local.layout import Layout, write_private
from esper_core.rpc.policy import PRINCIPALS, SERVICES

SIGNERS: Mapping[str, Role] = {"tezzeret": "build", "urabrask": "validation", "operator": "library"}

_CA_LIFE = dt.timedelta(days=3650)
_LEAF_LIFE = dt.timedelta(days=397)
_RENEW_BEFORE = dt.timedelta(days=30)
_BACKDATE = dt.timedelta(days=1)  # a clock that was set back must not lock everybody out
_WILDCARDS = {"0.0.0.0", "::", ""}  # noqa: S104 - names that no certificate can carry


def provision(layout: Layout, host: str) -> None:
    """Make what is missing or about to expire under ``tls/`` and ``keys/``.

    Args:
        host: the name or address the services listen on, in the server certificate beside loopback.

    Raises:
        Corrupt: a kept key or certificate cannot be read.
    """
    try:
        ca, ca_key = _authority(layout)
        names = ["localhost", "127.0.0.1", "::1"]
        if host not in _WILDCARDS and host not in names:
            names.append(host)
        _leaf(layout, "server", tuple(sorted(SERVICES)), names, ExtendedKeyUsageOID.SERVER_AUTH, ca, ca_key)
        for principal in sorted(PRINCIPALS):
            _leaf(layout, principal, (principal,), [], ExtendedKeyUsageOID.CLIENT_AUTH, ca, ca_key)
        _signing_keys(layout.keys)
    except ValueError as error:
        raise Corrupt(
            f"a certificate or key under {layout.root} is damaged ({error})",
            hint="delete tls/ and secrets/ca.key to have the certificates made anew; restore keys/ from a backup",
        ) from error


def _authority(layout: Layout) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    path, key_path = layout.tls / "ca.pem", layout.secrets / "ca.key"
    if path.exists() and key_path.exists():
        return x509.load_pem_x509_certificate(path.read_bytes()), _load(key_path)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Esper local CA")])
    ski = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    cert = (
        _dated(x509.CertificateBuilder(), _CA_LIFE)
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(ski, critical=False)
        .sign(key, hashes.SHA256())
    )
    write_private(key_path, _pem(key))
    write_private(path, cert.public_bytes(serialization.Encoding.PEM))
    return cert, key


def _leaf(
    layout: Layout,
    name: str,
    principals: tuple[str, ...],
    hosts: list[str],
    purpose: ObjectIdentifier,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
) -> None:
    """Issue ``name``.pem and .key unless a good pair is there."""
    path, key_path = layout.tls / f"{name}.pem", layout.tls / f"{name}.key"
    alternatives = x509.SubjectAlternativeName(
        [_host_name(host) for host in hosts]
        + [x509.UniformResourceIdentifier(f"spiffe://esper/{principal}") for principal in principals]
    )
    if (
        path.exists()
        and key_path.exists()
        and _good(x509.load_pem_x509_certificate(path.read_bytes()), ca, alternatives)
    ):
        return
    key = ec.generate_private_key(ec.SECP256R1())
    cert = (
        _dated(x509.CertificateBuilder(), _LEAF_LIFE)
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .add_extension(alternatives, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    path.unlink(missing_ok=True)  # never an old certificate beside a new key
    write_private(key_path, _pem(key))
    write_private(path, cert.public_bytes(serialization.Encoding.PEM))


def _good(cert: x509.Certificate, ca: x509.Certificate, alternatives: x509.SubjectAlternativeName) -> bool:
    if cert.not_valid_after_utc - dt.datetime.now(dt.UTC) < _RENEW_BEFORE:
        return False
    if cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value != alternatives:
        return False
    issuer = cert.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    return issuer == ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest


def _signing_keys(folder: Path) -> None:
    """One key per signer, and the list of whom to believe in which role."""
    listed, fresh = [], []
    for principal, role in SIGNERS.items():
        path = folder / f"{principal}.key"
        new = not path.exists()
        if new:
            write_private(path, generate_key())
        entry = trust_entry(role, public_pem(_pem(_load(path))))
        listed.append(entry)
        if new and role == "library":
            fresh.append(entry)
    trust = folder / "trust.json"
    if not trust.exists():  # afterwards it is the operator's: keys are revoked and added there
        write_private(trust, TrustList(keys=tuple(listed)).dump().encode())
    elif fresh:  # a list from before operators signed libraries: nobody can have revoked a key that was made just now
        write_private(trust, TrustList(keys=(*TrustList.load(trust).keys, *fresh)).dump().encode())


def _load(path: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path.name} holds no ECDSA key")
    return key


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _dated(builder: x509.CertificateBuilder, life: dt.timedelta) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        builder.serial_number(x509.random_serial_number()).not_valid_before(now - _BACKDATE).not_valid_after(now + life)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
