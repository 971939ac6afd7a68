"""Each server of the stack does its work for the right credentials and refuses others."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest

from esper_core.bus.bus import Bus
from esper_core.config import Endpoints
from esper_core.local import state


async def test_postgres_lets_in_by_password_only(stack: Endpoints, database: str) -> None:
    connection = await asyncpg.connect(database)
    try:
        assert await connection.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0
        assert await connection.fetchval("SHOW listen_addresses") == ""
        assert await connection.fetchval("SHOW fsync") == "on"
    finally:
        await connection.close()
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(database, password="wrong")


async def test_nats_lets_in_by_key_only(stack: Endpoints) -> None:
    bus = await Bus.join(stack, "oona")
    try:
        assert bus.client.max_payload == 1024 * 1024
        assert (await bus.jetstream.account_info()).limits is not None
    finally:
        await bus.close()
    host, port = stack.nats_url.removeprefix("nats://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as anonymous, anonymous.makefile("rb") as answers:
        anonymous.sendall(b"CONNECT {}\r\nPING\r\n")
        assert json.loads(answers.readline().removeprefix(b"INFO "))["auth_required"] is True
        assert answers.readline() == b"-ERR 'Authorization Violation'\r\n"


async def test_a_bucket_takes_and_gives_back_blobs(bucket: Endpoints) -> None:
    import aioboto3
    import botocore.exceptions

    def client(secret: str) -> Any:
        return aioboto3.Session().client(
            "s3",
            endpoint_url=bucket.s3_endpoint,
            aws_access_key_id=bucket.s3_access_key,
            aws_secret_access_key=secret,
            region_name=bucket.s3_region,
        )

    async with client(bucket.s3_secret_key.get_secret_value()) as s3:
        assert "Contents" not in await s3.list_objects_v2(Bucket=bucket.s3_bucket)
        await s3.put_object(Bucket=bucket.s3_bucket, Key="a/b", Body=b"\x00\xff")
        answer = await s3.get_object(Bucket=bucket.s3_bucket, Key="a/b")
        assert await answer["Body"].read() == b"\x00\xff"
    async with client("wrong") as s3:
        with pytest.raises(botocore.exceptions.ClientError):
            await s3.get_object(Bucket=bucket.s3_bucket, Key="a/b")


def test_nothing_listens_beyond_loopback(stack: Endpoints) -> None:
    found = _processes(stack)
    listening = [c for process in found for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert len(found) == 3
    assert {c.laddr.ip for c in listening} == {"127.0.0.1"}
    assert len(listening) == 2  # NATS and S3; PostgreSQL has its socket only


def test_no_secret_shows_in_the_process_list_or_the_logs(stack: Endpoints) -> None:
    assert stack.nats_keys_dir is not None
    secret = {
        *(seed.read_text() for seed in stack.nats_keys_dir.iterdir()),
        stack.s3_secret_key.get_secret_value(),
        json.loads((stack.data_dir / "secrets" / "credentials.json").read_text())["postgres_password"],
    }
    seen = "".join(" ".join(process.cmdline()) for process in _processes(stack))
    seen += "".join(path.read_text() for path in (stack.data_dir / "logs").iterdir())
    assert "postgres" in seen
    assert not [value for value in secret if value in seen]


def test_private_things_are_private(stack: Endpoints) -> None:
    for path in stack.data_dir.rglob("*"):
        if path.is_file() and not _kept_by_a_server(path.relative_to(stack.data_dir)):
            assert path.stat().st_mode & 0o077 == 0, path
    for path in stack.data_dir.iterdir():
        if path.is_dir():
            assert path.stat().st_mode & 0o077 == 0, path
    assert stack.data_dir.stat().st_mode & 0o066 == 0


def _kept_by_a_server(path: Path) -> bool:
    return path.parts[0] in {"postgres", "s3"} or path.parts[:2] == ("nats", "jetstream")


def _processes(stack: Endpoints) -> list[psutil.Process]:
    last = state.read(stack.data_dir / "state.json")
    assert last is not None
    return [psutil.Process(child.pid) for child in last.children if child.pid]


def test_grpc_port_is_left_free_for_the_services(stack: Endpoints) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", int(stack.grpc_address.rpartition(":")[2])))
