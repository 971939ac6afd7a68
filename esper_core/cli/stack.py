"""``esperctl up``, ``down`` and ``status``: the platform on this machine as a whole."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.status import Status

from esper_core.cli.command import Invocation, command
from esper_core.cli.output import STYLES, cell, console, fields, table, words
from esper_core.errors import EsperError, Unavailable

if TYPE_CHECKING:
    from esper_core.config import Endpoints, PlatformConfig
    from esper_core.local.stack import StackStatus

_NO_VARIABLES = "ESPERCTL-NONE "
"""A prefix no variable has: what was typed wins over the environment, which was read before it."""
_SERVICES = "services"
"""The child that answers gRPC; a platform may be started without it."""
_HEALTH_SECONDS = 2.0

PortOption = typer.Option(min=1, max=65535, show_default="a free one, kept", rich_help_panel="Our own servers")


def register(app: typer.Typer) -> None:
    """Put the three commands into ``app``."""
    command(app, "up", rich_help_panel="Platform")(up)
    command(app, "down", rich_help_panel="Platform")(down)
    command(app, "status", rich_help_panel="Platform")(status)


def up(
    call: Invocation,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A YAML file of platform settings.")] = None,
    nats_url: Annotated[str | None, typer.Option(help="Use this NATS server.", rich_help_panel="Elsewhere")] = None,
    postgres_dsn: Annotated[
        str | None,
        typer.Option(help="Use this PostgreSQL; better as ESPER_POSTGRES__DSN.", rich_help_panel="Elsewhere"),
    ] = None,
    s3_endpoint: Annotated[str | None, typer.Option(help="Use this S3 server.", rich_help_panel="Elsewhere")] = None,
    grpc_port: Annotated[int | None, PortOption] = None,
    nats_port: Annotated[int | None, PortOption] = None,
    s3_port: Annotated[int | None, PortOption] = None,
    metrics_port: Annotated[int | None, PortOption] = None,
) -> None:
    """Start the platform and wait until all of it works.

    Starts NATS, PostgreSQL, an S3 server and the services under one data directory, on loopback and unix
    sockets, and heals what dies. May be repeated. Options win over ESPER_* variables, which win over the file.

    Example:  esperctl up --data-dir /data/esper

    Example:  ESPER_NATS__PASSWORD=... esperctl up --nats-url tls://nats.lan:4222
    """
    from esper_core.local import stack

    options: dict[str, dict[str, Any]] = {
        "nats": {"url": nats_url, "port": nats_port},
        "postgres": {"dsn": postgres_dsn},
        "s3": {"endpoint": s3_endpoint, "port": s3_port},
        "grpc": {"port": grpc_port},
        "metrics": {"port": metrics_port},
    }
    settings = _settings(call, config, options)
    with _Progress() as progress:
        endpoints = stack.up(settings, progress)
    found = stack.status(settings)
    call.output.document(_document(found) | {"endpoints": _public(endpoints)}, _where(endpoints))


def down(call: Invocation) -> None:
    """Stop the platform and leave its data.

    May be repeated.

    Example:  esperctl down
    """
    from esper_core.local import stack

    settings = _settings(call, None, {})
    begun = time.monotonic()
    ran = stack.down(settings)
    took = time.monotonic() - begun
    said = f"stopped in {took:.1f} s; the data stays in {settings.data_dir}" if ran else "nothing was running"
    call.output.document({"stopped": ran, "seconds": round(took, 2), "data_dir": str(settings.data_dir)}, said)


def status(call: Invocation) -> None:
    """Say what runs and whether it is healthy.

    Exit code 8 when something is not.

    Example:  esperctl status -o json | jq .healthy
    """
    from esper_core.local import stack

    settings = _settings(call, None, {})
    found = stack.status(settings)
    serving = found.running and any(child.name == _SERVICES for child in found.children)
    served = asyncio.run(_served(call)) if serving else {}
    healthy = found.healthy and all(answer == "SERVING" for answer in served.values())
    document = _document(found) | {"healthy": healthy, "services": served}
    summary = [
        ("platform", "healthy" if healthy else "unhealthy" if found.running else "not running"),
        ("data", str(found.data_dir)),
        ("supervisor", f"pid {found.pid}" if found.pid else None),
    ]
    views = [fields(summary), cell(" "), _children(found)]
    if served:
        rows = [(name, "healthy" if answer == "SERVING" else answer) for name, answer in served.items()]
        views += [cell(" "), table(("SERVICE", "STATE"), rows, empty="")]
    call.output.document(document, *views)
    if not found.running:
        raise Unavailable("the platform is not running", hint="start it with `esperctl up`")
    if not healthy:
        raise Unavailable("the platform is not healthy", hint=f"see the logs in {found.data_dir / 'logs'}")


class _Progress:
    """What starts and how long it takes: a line for each child that is ready, and on a terminal what is awaited now."""

    def __init__(self) -> None:
        self._page = console(sys.stderr)
        self._waiting: Status | None = self._page.status("starting") if sys.stderr.isatty() else None
        self._begun: dict[str, float] = {}
        self._pending: list[str] = []
        self._quiet = False

    def __enter__(self) -> _Progress:
        if self._waiting:
            self._waiting.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._waiting:
            self._waiting.stop()

    def __call__(self, name: str, phase: str, seconds: float) -> None:
        if phase == "running already":
            self._page.print("the platform is running already")
            self._quiet = True
        if self._quiet and phase == "ready":
            return
        if phase == "starting":
            self._begun.setdefault(name, seconds)
            self._pending.append(name)
        elif phase not in ("waiting", "running already"):
            took = seconds - self._begun.get(name, 0.0)
            style = {"ready": "green", "failed": "bold red", "restarting": "yellow"}.get(phase, STYLES.get(phase, ""))
            line = words(f"{name:<12} ", cell(phase))
            line.stylize(style, len(f"{name:<12} "))
            self._page.print(line.append(f"  {took:.1f} s", "dim"))
            self._pending = [other for other in self._pending if other != name]
        if self._waiting:
            self._waiting.update(f"starting {', '.join(self._pending)}" if self._pending else "starting")


def _settings(call: Invocation, path: Path | None, options: Mapping[str, Mapping[str, Any]]) -> PlatformConfig:
    """File, then environment, then what was typed.

    Raises:
        NotFound, InvalidInput: as ``config.load``.
    """
    from esper_core.config import PlatformConfig, load

    settings = load(PlatformConfig, path)
    typed: dict[str, Any] = {} if call.given_data_dir is None else {"data_dir": call.data_dir}
    for section, values in options.items():
        given = {key: value for key, value in values.items() if value is not None}
        if given:
            typed[section] = getattr(settings, section).model_dump() | given
    if not typed:
        return settings
    return load(PlatformConfig, settings.model_dump() | typed, env_prefix=_NO_VARIABLES)


async def _served(call: Invocation) -> dict[str, str]:
    """What each service answers when asked for its health; how it failed when it does not answer."""
    answers: dict[str, str] = {}
    async with call.platform() as platform:
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        from esper_core.cli.platform import SERVICES, stub

        health = stub(health_pb2_grpc.HealthStub, platform.channel)
        for name in SERVICES:
            request = health_pb2.HealthCheckRequest(service=name)
            try:
                answer = await health.Check(request, timeout=_HEALTH_SECONDS)
                answers[name] = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
            except Unavailable:
                answers[name] = "UNREACHABLE"
            except EsperError as failure:
                answers[name] = failure.status
    return answers


def _document(found: StackStatus) -> dict[str, Any]:
    return {
        "running": found.running,
        "healthy": found.healthy,
        "data_dir": str(found.data_dir),
        "pid": found.pid,
        "children": [child.model_dump(mode="json", exclude={"born"}) for child in found.children],
    }


def _children(found: StackStatus) -> Any:
    rows = [
        (
            child.name, child.phase.value, child.healthy, "elsewhere" if child.external else child.pid, child.port,
            child.restarts, _uptime(child.started) if child.pid else None, child.message,
        )
        for child in found.children
    ]  # fmt: skip
    columns = ("CHILD", "PHASE", "HEALTHY", ">PID", ">PORT", ">RESTARTS", ">UPTIME", "*MESSAGE")
    return table(columns, rows, empty="nothing was ever started here")


def _uptime(started: float | None) -> str:
    if started is None:
        return ""
    seconds = max(0, int(time.time() - started))
    hours, rest = divmod(seconds, 3600)
    return f"{hours}h{rest // 60:02}m" if hours else f"{rest // 60}m{rest % 60:02}s"


def _public(endpoints: Endpoints) -> dict[str, Any]:
    """The endpoints without anything secret."""
    shown = ("data_dir", "grpc_address", "metrics_url", "nats_url", "s3_endpoint", "s3_bucket", "tls_dir", "keys_dir")
    return {name: str(getattr(endpoints, name)) for name in shown}


def _where(endpoints: Endpoints) -> Any:
    pairs = [
        ("data", str(endpoints.data_dir)),
        ("services", f"{endpoints.grpc_address} (mutual TLS, {endpoints.tls_dir})"),
        ("metrics", endpoints.metrics_url),
        ("next", "esperctl train --list"),
    ]
    return fields(pairs)
