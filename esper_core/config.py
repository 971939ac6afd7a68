"""Configuration: one loader for every YAML file and ``ESPER_*`` variable, and where the platform is.

``load`` turns a file or a mapping into a pydantic model, lays the environment over it (``ESPER_SECTION__KEY``) and
refuses what it does not know, naming the place and the nearest known name. ``PlatformConfig`` says what the laptop
stack should start and what it should find elsewhere; ``Endpoints`` is what came of it, read by every client.

Does not protect against a hostile reader of the data directory: whoever reads it (``endpoints.json``, ``tls/``,
``nkeys/``, all mode 0600) holds every credential of this platform.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from esper_core.errors import Corrupt, InvalidInput, NotFound, nearest

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
ENDPOINTS_FILE = "endpoints.json"

M = TypeVar("M", bound=BaseModel)
_Loc = tuple[int | str, ...]


class Section(BaseModel):
    """A part of a configuration: immutable, and deaf to no key it was given."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def default_data_dir() -> Path:
    """Where the platform lives unless told otherwise: ``~/.esper``."""
    return Path("~/.esper").expanduser()


class NatsSection(Section):
    """The event bus; without ``url`` a server of our own is started, which knows each principal by its own key."""

    url: str | None = Field(None, pattern=r"^(nats|tls)://", description="an external server, e.g. tls://nats:4222")
    user: str = Field("esper", min_length=1, description="of the external server")
    password: SecretStr | None = Field(None, description="of the external server")
    port: int | None = Field(None, ge=0, le=65535, description="of our own server; 0 or nothing: a free one, kept")


class PostgresSection(Section):
    """The system of record; without ``dsn`` a server of our own is started on a unix socket."""

    dsn: SecretStr | None = Field(None, description="an external server: postgresql://user:password@host:port/database")


class S3Section(Section):
    """Blob storage; without ``endpoint`` a server of our own is started."""

    endpoint: str | None = Field(
        None, pattern=r"^https?://", description="an external server, e.g. https://s3.lan:9000"
    )
    access_key: str | None = Field(None, min_length=3)
    secret_key: SecretStr | None = None
    bucket: str = Field("esper", pattern=r"^[a-z0-9][a-z0-9.-]{2,62}$")
    region: str = "us-east-1"
    port: int | None = Field(None, ge=0, le=65535)


class GrpcSection(Section):
    """Where the services listen, always with mutual TLS."""

    host: str = Field("127.0.0.1", min_length=1)
    port: int | None = Field(None, ge=0, le=65535)


class MetricsSection(Section):
    """Where Prometheus reads; plain HTTP, hence loopback only."""

    port: int | None = Field(None, ge=0, le=65535)


class UpkeepSection(Section):
    """What the platform does by itself, and how long it waits: the one place where these are set."""

    verdict_seconds: float = Field(
        1800.0,
        gt=0,
        allow_inf_nan=False,
        description="a built kernel that Urabrask has not judged by then is not waited for",
    )
    collect_hours: float = Field(
        6.0, ge=0, le=8760, allow_inf_nan=False, description="between collections of the library's garbage; 0: none"
    )
    keep_unused: int = Field(
        1000, ge=0, le=100_000_000, description="never used kernels stay while they are among the newest so many"
    )


class PlatformConfig(Section):
    """What ``esperctl up`` starts. Variables: ``ESPER_DATA_DIR``, ``ESPER_NATS__URL``, ``ESPER_GRPC__PORT`` …"""

    data_dir: Path = Field(default_factory=default_data_dir, description="everything the platform keeps")
    nats: NatsSection = NatsSection()
    postgres: PostgresSection = PostgresSection()
    s3: S3Section = S3Section()
    grpc: GrpcSection = GrpcSection()
    metrics: MetricsSection = MetricsSection()
    upkeep: UpkeepSection = UpkeepSection()
    services_command: tuple[str, ...] | None = Field(
        None, description="the process that serves the services; nothing: `python -m services`; empty: none at all"
    )

    @field_validator("data_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return Path(os.path.abspath(value.expanduser()))


class Endpoints(Section):
    """Where everything of a started platform is found, and how to get in."""

    data_dir: Path
    grpc_address: str = Field(description="host:port to dial, mutual TLS")
    grpc_listen: str = Field(description="host:port the services bind")
    metrics_port: int
    metrics_url: str
    nats_url: str
    nats_keys_dir: Path | None = Field(
        None, description="<principal>.nk (seeds) of our own server; none: an external one"
    )
    nats_user: str | None = None
    nats_password: SecretStr | None = None
    postgres_dsn: SecretStr = Field(description="for asyncpg; our own server is reached over its unix socket")
    s3_endpoint: str
    s3_region: str
    s3_bucket: str
    s3_access_key: str
    s3_secret_key: SecretStr
    tls_dir: Path = Field(description="ca.pem, server.pem/.key, <principal>.pem/.key")
    keys_dir: Path = Field(
        description="tezzeret.key, urabrask.key, operator.key (PEM), trust.json (public keys by id and role)"
    )
    upkeep: UpkeepSection = UpkeepSection()


def read_endpoints(data_dir: Path) -> Endpoints:
    """The endpoints of the platform under ``data_dir``, whether or not it runs at this moment.

    Raises:
        NotFound: nothing was ever started there.
        Corrupt: the file is not one that ``esperctl up`` wrote.
    """
    path = data_dir / ENDPOINTS_FILE
    try:
        return Endpoints.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise NotFound(f"no platform under {data_dir}", hint="start one with `esperctl up`") from None
    except PermissionError:
        raise NotFound(f"{path} may not be read by this user", hint="use the account that ran `esperctl up`") from None
    except ValidationError as error:
        raise Corrupt(f"{path} is damaged ({error.error_count()} faults)", hint="run `esperctl up` again") from None


def load(model: type[M], source: Path | str | Mapping[str, Any] | None = None, *, env_prefix: str = "ESPER_") -> M:
    """Read ``model`` from a YAML file (or a mapping, or nothing) with the environment laid over it.

    Args:
        model: a pydantic model whose sections forbid unknown keys.
        source: path of a YAML file, or the mapping itself; ``None`` takes defaults and environment only.
        env_prefix: variables that begin with it override, ``PREFIX_SECTION__KEY``; lists as JSON.

    Raises:
        NotFound: there is no such file.
        InvalidInput: malformed, too large, an unknown key, a value of the wrong kind; with place and hint.
    """
    name = "configuration"
    given: Mapping[str, Any] = {}
    if isinstance(source, Mapping):
        given = source
    elif source is not None:
        name = str(source)
        given = read_yaml(Path(source))
    overlay = _environment(model, env_prefix)
    try:
        return model.model_validate(_merged(given, overlay))
    except ValidationError as error:
        raise _explained(model, error, name, overlay, env_prefix) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; plain data only: no tags, no aliases, no key twice.

    Raises:
        NotFound, InvalidInput: as ``load``.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise NotFound(f"no file {path}", hint="check the path, or name one of the presets") from None
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}", hint="it must be a readable text file") from None
    if len(raw) > MAX_BYTES:
        raise InvalidInput(f"{path} is larger than {MAX_BYTES // 1024} KiB", hint="a configuration is a small file")
    try:
        value = parse_yaml(raw.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not UTF-8 (byte {error.start})", hint="save it as plain UTF-8 text") from None
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InvalidInput(f"{path} holds no mapping", hint="write `key: value` lines")
    return value


class _Loader(yaml.SafeLoader):
    """The safe loader, which also refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen if isinstance(key, yaml.ScalarNode) else False:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, name: str) -> Any:
    """The plain value that YAML ``text`` spells; ``name`` stands in messages."""
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            line = event.start_mark.line + 1 if event.start_mark else 0
            where = f"{name}, line {line}"
            if isinstance(event, yaml.AliasEvent):
                raise InvalidInput(f"{where}: aliases (*{event.anchor}) are not read", hint="write the value out")
            if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
                raise InvalidInput(f"{where}: tags ({event.tag}) are not read", hint="write plain values")
            if depth > MAX_DEPTH:
                raise InvalidInput(f"{where}: nested deeper than {MAX_DEPTH}", hint="a configuration is shallow")
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader that is stricter still
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}, line {mark.line + 1}, column {mark.column + 1}" if mark else name
        raise InvalidInput(
            f"{where}: {error.problem or 'malformed YAML'}", hint="check indentation, quotes and the ':' on that line"
        ) from None
    except yaml.YAMLError as error:
        raise InvalidInput(f"{name}: {str(error).splitlines()[0]}", hint="save it as plain UTF-8 text") from None
    except (ValueError, OverflowError) as error:
        raise InvalidInput(f"{name}: {error}", hint="quote values that are neither numbers nor dates") from None


def _environment(model: type[BaseModel], prefix: str) -> dict[str, Any]:
    """What the environment says about ``model``'s sections; a near miss of a section's name is refused."""
    heads = {key[len(prefix) :].split("__")[0].lower() for key in os.environ if key.upper().startswith(prefix)}
    fields = set(model.model_fields)
    for head in sorted(heads - fields):
        if hint := _all_but(head, fields):
            raise InvalidInput(f"{prefix}{head.upper()} is no setting", hint=f"did you mean {prefix}{hint.upper()}?")
    if not heads & fields:
        return {}
    from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsError  # 0.1 s, paid only when used

    settings = type("Settings", (model, BaseSettings), {"__module__": __name__})
    try:
        return EnvSettingsSource(settings, env_prefix=prefix, env_nested_delimiter="__")()
    except SettingsError as error:
        raise InvalidInput(f"the environment's {prefix}* variables: {error}", hint="lists are JSON: [1, 2]") from None


def _all_but(word: str, known: set[str]) -> str:
    """The one known name that ``word`` all but spells, or nothing: another program's variable is not ours to refuse."""
    squeezed = {name.replace("_", ""): name for name in known}
    return squeezed.get(word.replace("_", ""), "")


def _merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(low)
    for key, value in high.items():
        below = out.get(key)
        out[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return out


def _explained(
    model: type[BaseModel], error: ValidationError, name: str, overlay: Mapping[str, Any], prefix: str
) -> InvalidInput:
    """All faults in one message, each with its place; the hint belongs to the first."""
    lines, hints = [], []
    faults = error.errors(include_url=False, include_context=False)
    for fault in sorted(faults, key=lambda fault: fault["type"] != "extra_forbidden"):
        loc = fault["loc"]
        where = _variable(loc, overlay, prefix) or f"{name}: {'.'.join(map(str, loc)) or 'the whole'}"
        if fault["type"] == "extra_forbidden":
            lines.append(f"{where} is no setting")
            hints.append(nearest(str(loc[-1]), _model_at(model, loc[:-1]).model_fields))
        else:
            shown = "" if _secret(model, loc) or fault["type"] == "missing" else f" (got {str(fault['input'])[:60]!r})"
            lines.append(f"{where}: {fault['msg']}{shown}")
            hints.append(_described(model, loc))
    return InvalidInput("; ".join(lines[:8]), hint=next((hint for hint in hints if hint), ""))


def _variable(loc: _Loc, overlay: Mapping[str, Any], prefix: str) -> str:
    here: Any = overlay
    for step in loc:
        if not isinstance(here, Mapping) or step not in here:
            return ""
        here = here[step]
    return prefix + "__".join(str(step).upper() for step in loc) if loc else ""


def _model_at(model: type[BaseModel], loc: _Loc) -> type[BaseModel]:
    """The innermost model on the way to ``loc``; steps that are no field (indexes, union tags) are passed over."""
    for step in loc:
        field = model.model_fields.get(str(step))
        inner = _models_in(field.annotation) if field else []
        if len(inner) == 1:
            model = inner[0]
    return model


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models_in(part)]


def _secret(model: type[BaseModel], loc: _Loc) -> bool:
    """Whether the value at ``loc`` may be one that must not be shown; unknown places count as secret."""
    field = _model_at(model, loc[:-1]).model_fields.get(str(loc[-1])) if loc else None
    return field is None or "Secret" in str(field.annotation) or bool(_models_in(field.annotation))


def _described(model: type[BaseModel], loc: _Loc) -> str:
    field = _model_at(model, loc[:-1]).model_fields.get(str(loc[-1])) if loc else None
    return (field.description or "") if field else ""
