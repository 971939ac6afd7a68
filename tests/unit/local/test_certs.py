"""Who is who: chains, names, purposes, renewal, signing keys."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from esper_core.errors import Corrupt
from esper_core.kernel.trust import TrustList
from esper_core.local import certs
from esper_core.local.layout import Layout
from esper_core.rpc import policy

PRINCIPALS = {
    *("tolaria", "tamiyo", "kasmina", "urza", "tezzeret", "urabrask"),
    *("nissa", "oona", "simic", "emrakul", "karn", "operator"),
}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    found = Layout(tmp_path / "esper")
    found.create()
    certs.provision(found, "127.0.0.1")
    return found


def read(layout: Layout, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((layout.tls / f"{name}.pem").read_bytes())


def uris(cert: x509.Certificate) -> list[str]:
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def content(layout: Layout) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for part in (layout.tls, layout.keys, layout.secrets) for p in part.iterdir()}


def test_every_principal_has_a_client_certificate_that_names_it_alone(layout: Layout) -> None:
    assert set(policy.PRINCIPALS) == PRINCIPALS
    ca = read(layout, "ca")
    for principal in PRINCIPALS:
        cert = read(layout, principal)
        cert.verify_directly_issued_by(ca)
        assert uris(cert) == [f"spiffe://esper/{principal}"]
        usage = cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
        assert isinstance(cert.public_key(), ec.EllipticCurvePublicKey)
        assert cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False


def test_the_server_certificate_listens_and_does_not_dial(layout: Layout) -> None:
    cert = read(layout, "server")
    assert set(uris(cert)) == {f"spiffe://esper/{name}" for name in PRINCIPALS - {"tolaria", "operator"}}
    assert list(cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.SERVER_AUTH
    ]
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]


def test_a_second_start_changes_nothing(layout: Layout) -> None:
    before = content(layout)
    certs.provision(layout, "127.0.0.1")
    assert content(layout) == before


def test_a_new_host_name_renews_the_server_certificate_alone(layout: Layout) -> None:
    before = content(layout)
    certs.provision(layout, "esper.lan")
    changed = {Path(path).name for path, data in content(layout).items() if before[path] != data}
    assert changed == {"server.pem", "server.key"}
    names = read(layout, "server").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "esper.lan"]


def test_a_certificate_near_its_end_is_renewed(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    (layout.tls / "urza.pem").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(certs, "_LEAF_LIFE", dt.timedelta(days=29))
        certs.provision(layout, "127.0.0.1")
    old = read(layout, "urza")
    certs.provision(layout, "127.0.0.1")
    assert read(layout, "urza").not_valid_after_utc - old.not_valid_after_utc > dt.timedelta(days=300)


def test_a_new_authority_reissues_everything_it_did_not_sign(layout: Layout) -> None:
    (layout.secrets / "ca.key").unlink()
    certs.provision(layout, "127.0.0.1")
    for name in (*PRINCIPALS, "server"):
        read(layout, name).verify_directly_issued_by(read(layout, "ca"))


def test_the_trust_list_names_all_signers_with_different_keys(layout: Layout) -> None:
    listed = {key.role: key for key in TrustList.load(layout.keys / "trust.json").keys}
    assert set(listed) == {"build", "validation", "library"}
    assert len({key.public_key_pem for key in listed.values()}) == 3
    for principal, role in (("tezzeret", "build"), ("urabrask", "validation"), ("operator", "library")):
        private = serialization.load_pem_private_key((layout.keys / f"{principal}.key").read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        public = serialization.load_pem_public_key(listed[role].public_key_pem.encode())
        assert isinstance(public, ec.EllipticCurvePublicKey)
        public.verify(private.sign(b"x", ec.ECDSA(hashes.SHA256())), b"x", ec.ECDSA(hashes.SHA256()))


def test_an_edited_trust_list_is_left_as_it_is(layout: Layout) -> None:
    (layout.keys / "trust.json").write_text('{"keys": []}')
    certs.provision(layout, "127.0.0.1")
    assert (layout.keys / "trust.json").read_text() == '{"keys": []}'


def test_a_list_from_before_libraries_were_signed_gets_the_operator_s_new_key_once(layout: Layout) -> None:
    whole = TrustList.load(layout.keys / "trust.json")
    old = TrustList(keys=tuple(key for key in whole.keys if key.role != "library"))
    (layout.keys / "trust.json").write_text(old.dump())
    certs.provision(layout, "127.0.0.1")  # the key is there: whoever took it off the list meant it
    assert TrustList.load(layout.keys / "trust.json") == old
    (layout.keys / "operator.key").unlink()
    certs.provision(layout, "127.0.0.1")
    *kept, new = TrustList.load(layout.keys / "trust.json").keys
    assert (tuple(kept), new.role) == (old.keys, "library")


def test_a_damaged_key_is_an_error_that_says_what_to_do(layout: Layout) -> None:
    (layout.keys / "urabrask.key").write_text("rubbish")
    with pytest.raises(Corrupt, match="damaged") as caught:
        certs.provision(layout, "127.0.0.1")
    assert "backup" in caught.value.hint
