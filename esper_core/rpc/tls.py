"""The certificates both sides need, read from one directory: ``ca.pem``, ``<name>.pem`` and ``<name>.key``.

Knows nothing of how they are made or renewed. Whoever reads a ``.key`` is that principal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import grpc

from esper_core.errors import NotFound


@dataclass(frozen=True)
class _Material:
    """A certificate with its key, and the authority that vouches for the other side; all PEM."""

    authority: bytes
    certificate: bytes
    key: bytes = field(repr=False)


class ServerTls(_Material):
    """What a server shows, and whose clients it lets in."""

    @classmethod
    def read(cls, tls_dir: Path, name: str = "server") -> ServerTls:
        """Read a server's material.

        Raises:
            NotFound: a file is missing or may not be read.
        """
        return cls(*_read(tls_dir, name))

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials that demand a certificate of every client."""
        return grpc.ssl_server_credentials([(self.key, self.certificate)], self.authority, require_client_auth=True)


def client_credentials(tls_dir: Path, principal: str) -> grpc.ChannelCredentials:
    """Credentials to dial as ``principal``.

    Raises:
        NotFound: a file is missing or may not be read.
    """
    authority, certificate, key = _read(tls_dir, principal)
    return grpc.ssl_channel_credentials(authority, key, certificate)


def _read(tls_dir: Path, name: str) -> tuple[bytes, bytes, bytes]:
    paths = (tls_dir / "ca.pem", tls_dir / f"{name}.pem", tls_dir / f"{name}.key")
    try:
        authority, certificate, key = (path.read_bytes() for path in paths)
    except OSError as error:
        raise NotFound(
            f"the certificates of {name!r} cannot be read: {error.filename}: {error.strerror}",
            hint="`esperctl up` makes them; use the account that ran it",
        ) from None
    return authority, certificate, key
