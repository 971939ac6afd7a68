"""From a configuration to what has to run: secrets and certificates made, children described, endpoints written down.

Called by the supervisor alone, under its lock.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from urllib.parse import urlsplit

from pydantic import SecretStr

from esper_core.config import Endpoints, PlatformConfig
from esper_core.errors import InvalidInput
from esper_core.local import certs, nats, postgres, s3, services
from esper_core.local.child import Child
from esper_core.local.credentials import Credentials, Ports, credentials, ports, revealed
from esper_core.local.layout import Layout, write_private

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - what to dial when the services listen everywhere


@dataclass(frozen=True)
class Plan:
    """Children in starting order, and where clients will find them."""

    children: tuple[Child, ...]
    endpoints: Endpoints


def plan(config: PlatformConfig, layout: Layout) -> Plan:
    """Decide everything that is decided once; safe to repeat.

    Raises:
        EsperError: a part is not installed, a configured port is taken, a kept file is damaged, an external server is
            named without its credentials.
    """
    made, chosen = credentials(layout), ports(layout, config)
    certs.provision(layout, config.grpc.host)
    database, dsn = postgres.child(config.postgres, layout, made.postgres_password)
    endpoints = _endpoints(config, layout, made, chosen, dsn)
    children = [
        nats.child(config.nats, layout, chosen.nats),
        database,
        s3.child(config.s3, layout, endpoints.s3_access_key, endpoints.s3_secret_key.get_secret_value(), chosen.s3),
    ]
    command = services.COMMAND if config.services_command is None else config.services_command
    if command:
        children.append(services.child(command, endpoints))
    write_private(layout.endpoints, json.dumps(revealed(endpoints), indent=2).encode())
    return Plan(tuple(children), endpoints)


def _endpoints(config: PlatformConfig, layout: Layout, made: Credentials, chosen: Ports, dsn: str) -> Endpoints:
    host = config.grpc.host
    access_key, secret_key = config.s3.access_key, config.s3.secret_key
    if config.s3.endpoint and not (access_key and secret_key):
        raise InvalidInput(
            "s3.endpoint is given without s3.access_key and s3.secret_key",
            hint="set ESPER_S3__ACCESS_KEY and ESPER_S3__SECRET_KEY",
        )
    external_nats = config.nats.url is not None
    if config.nats.password and not external_nats:
        raise InvalidInput(
            "nats.password is given without nats.url",
            hint="it is for an external server; our own knows each principal by a key under nkeys/",
        )
    in_url = bool(config.nats.url and urlsplit(config.nats.url).username)
    return Endpoints(
        data_dir=layout.root,
        grpc_address=f"{_WILDCARDS.get(host, host)}:{chosen.grpc}",
        grpc_listen=f"{host}:{chosen.grpc}",
        metrics_port=chosen.metrics,
        metrics_url=f"http://127.0.0.1:{chosen.metrics}/metrics",
        nats_url=config.nats.url or f"nats://127.0.0.1:{chosen.nats}",
        nats_keys_dir=None if external_nats else layout.nkeys,
        nats_user=config.nats.user if external_nats and not in_url else None,
        nats_password=config.nats.password,
        postgres_dsn=SecretStr(dsn),
        s3_endpoint=config.s3.endpoint or f"http://127.0.0.1:{chosen.s3}",
        s3_region=config.s3.region,
        s3_bucket=config.s3.bucket,
        s3_access_key=access_key or made.s3_access_key,
        s3_secret_key=secret_key or SecretStr(made.s3_secret_key),
        tls_dir=layout.tls,
        keys_dir=layout.keys,
        upkeep=config.upkeep,
    )
