"""Passwords and ports, chosen once at first start and kept, so that clients find everything where it was.

Ports are taken below the system's ephemeral range: a port from that range may be in use as the near end of somebody's
outgoing connection at the very moment a killed server wants it back, and a client that redials a dead port in it can
end up connected to itself.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, SecretStr, ValidationError

from esper_core.config import PlatformConfig, Section
from esper_core.errors import Conflict, Corrupt, Exhausted
from esper_core.local.layout import Layout, write_private

_FIRST, _LAST = 20000, 32000
T = TypeVar("T", bound=Section)


class Credentials(Section):
    """Generated secrets of our own servers; URL-safe text."""

    postgres_password: str = Field(min_length=16)
    s3_access_key: str = Field(min_length=3)
    s3_secret_key: str = Field(min_length=16)


class Ports(Section):
    """Loopback TCP ports."""

    nats: int
    s3: int
    grpc: int
    metrics: int


def credentials(layout: Layout) -> Credentials:
    """The kept credentials, generated when there are none; what an older version kept beside them is forgotten.

    Raises:
        Corrupt: the kept file is damaged; it is never replaced silently, for the servers' data knows only the old ones.
    """
    path = layout.secrets / "credentials.json"
    if path.exists():
        _forget(path, "nats_password")  # one for everybody, before each principal had a key
        return _read(Credentials, path)
    fresh = Credentials(
        postgres_password=secrets.token_urlsafe(24),
        s3_access_key="esper" + secrets.token_hex(8),
        s3_secret_key=secrets.token_urlsafe(24),
    )
    write_private(path, fresh.model_dump_json(indent=2).encode())
    return fresh


def ports(layout: Layout, config: PlatformConfig) -> Ports:
    """Configured ports where given, else those of the last start, else free ones; kept for the next start.

    Raises:
        Conflict: a configured port is in use.
    """
    path = layout.secrets / "ports.json"
    kept = _read(Ports, path).model_dump() if path.exists() else {}
    wanted = {
        "nats": None if config.nats.url else config.nats.port,
        "s3": None if config.s3.endpoint else config.s3.port,
        "grpc": config.grpc.port,
        "metrics": config.metrics.port,
    }
    chosen: dict[str, int] = {}
    for name, port in wanted.items():
        if port and not is_free(port):
            raise Conflict(
                f"port {port}, configured for {name}, is in use",
                hint=f"stop what listens there, or leave {name}.port out to get a free one",
            )
        last = kept.get(name)
        if not port and last and last not in chosen.values() and is_free(last):
            port = last
        chosen[name] = port or free_port({*chosen.values(), *filter(None, wanted.values())})
    found = Ports(**chosen)
    write_private(path, found.model_dump_json(indent=2).encode())
    return found


def is_free(port: int) -> bool:
    """Whether a server could bind ``port`` on loopback now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_port(taken: set[int]) -> int:
    """A free loopback port that is none of ``taken``."""
    for _ in range(200):
        port = _FIRST + secrets.randbelow(_LAST - _FIRST)
        if port not in taken and is_free(port):
            return port
    raise Exhausted(f"no free port between {_FIRST} and {_LAST} in 200 tries", hint="configure the ports by hand")


def revealed(section: Section) -> dict[str, Any]:
    """``section`` as plain JSON values, secrets included: for a private file or a pipe to our own child."""
    shown = section.model_dump(mode="json")
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, SecretStr):
            shown[name] = value.get_secret_value()
        elif isinstance(value, Section):
            shown[name] = revealed(value)
    return shown


def _forget(path: Path, name: str) -> None:
    with contextlib.suppress(ValueError):  # damaged: whoever reads it says so
        kept = json.loads(path.read_bytes())
        if isinstance(kept, dict) and kept.pop(name, None) is not None:
            write_private(path, json.dumps(kept, indent=2).encode())


def _read(model: type[T], path: Path) -> T:
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError:
        raise Corrupt(
            f"{path} is damaged", hint="restore it from a backup, or start over with a new data directory"
        ) from None
