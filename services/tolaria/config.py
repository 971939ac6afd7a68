"""The settings of a training run: ``TolariaConfig``, read from a RUN.yaml, a preset, the environment and ``--set``.

Each section stands for one part of the trainer and documents its fields. A field that means nothing for the chosen host
or data set is refused rather than ignored.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from esper_core import presets
from esper_core.config import Section, default_data_dir, load, parse_yaml, read_yaml
from esper_core.control.carve.settings import CarveSettings
from esper_core.control.settings import GrowthSettings
from esper_core.errors import InvalidInput, NotFound, nearest
from esper_core.ids import check_name

HostName = Literal["mlp", "cnn", "resnet", "transformer", "python"]
DatasetName = Literal[
    "digits",
    "breast_cancer",
    "wine",
    "iris",
    "diabetes",
    "linnerud",
    "spirals",
    "teacher",
    "tokens",
    "cifar10",
    "arrays",
]
Activation = Literal["relu", "gelu", "silu", "tanh"]

_HOST_FIELDS: dict[str, set[str]] = {
    "mlp": {"widths", "activation"},
    "cnn": {"channels", "activation"},
    "resnet": {"channels", "blocks"},
    "transformer": {"width", "layers", "heads", "ffn", "activation"},
    "python": {"factory"},
}
_DATASET_FIELDS: dict[str, set[str]] = {
    "spirals": {"samples", "noise", "turns"},
    "teacher": {"samples", "features", "classes", "teacher_widths"},
    "tokens": {"modulus"},
    "cifar10": {"path"},
    "arrays": {"path"},
}
_FACTORY = re.compile(r"^[^:]+\.py:[A-Za-z_][A-Za-z0-9_]*$")
_SHARED_DATASET_FIELDS = {"name", "validation_fraction", "test_fraction", "seed"}


class ModelConfig(Section):
    """The host network."""

    host: HostName = Field("mlp", description="mlp, cnn, resnet, transformer, or python for one's own")
    factory: str | None = Field(
        None,
        description="python: FILE.py:FUNCTION that gives an nn.Module for (sample_shape, outputs); the file is run",
    )
    widths: tuple[int, ...] = Field((64, 64), description="mlp: units of the hidden layers, first to last")
    activation: Activation = Field("relu", description="relu, gelu, silu or tanh; resnet always has relu")
    channels: tuple[int, ...] = Field((16, 32, 64), min_length=1, description="cnn, resnet: channels of each stage")
    blocks: int = Field(3, ge=1, le=32, description="resnet: basic blocks per stage; 3 makes a ResNet-20")
    width: int = Field(64, ge=2, le=4096, description="transformer: features of a token")
    layers: int = Field(2, ge=1, le=48, description="transformer: blocks")
    heads: int = Field(4, ge=1, le=64, description="transformer: attention heads; must divide width")
    ffn: tuple[int, ...] = Field((256,), min_length=1, description="transformer: FFN units, of all blocks or of each")

    @property
    def own(self) -> dict[str, Any]:
        """The fields that mean something for its host, as plain values: what makes the same host again."""
        return self.model_dump(mode="json", include=_HOST_FIELDS[self.host] | {"host"})

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        _refuse_foreign(self, "model", f"host {self.host}", _HOST_FIELDS[self.host] | {"host"}, _HOST_FIELDS)
        if self.host == "python" and not _FACTORY.match(self.factory or ""):
            raise InvalidInput("model.factory must name a function in a file", hint="e.g. factory: nets/mine.py:build")
        if any(not 1 <= n <= 65536 for n in (*self.widths, *self.channels, *self.ffn)):
            raise InvalidInput("every layer of the host needs between 1 and 65536 units", hint="check model's widths")
        if self.host == "transformer":
            if self.width % self.heads:
                raise InvalidInput(
                    f"model.heads {self.heads} does not divide model.width {self.width}", hint="e.g. width 64, heads 4"
                )
            if len(self.ffn) not in (1, self.layers):
                raise InvalidInput(
                    f"model.ffn has {len(self.ffn)} widths for {self.layers} layers", hint="give one width, or one each"
                )
        return self


class DatasetConfig(Section):
    """The data and its split into training, validation and test part."""

    name: DatasetName = Field("digits", description=", ".join(get_args(DatasetName)))
    path: Path | None = Field(
        None, description="cifar10: folder with data_batch_1.bin … test_batch.bin; arrays: .npz with inputs and targets"
    )
    validation_fraction: float = Field(0.2, gt=0, lt=0.9, description="share held back for decisions about growth")
    test_fraction: float = Field(0.2, gt=0, lt=0.9, description="share never seen before the end; cifar10 has its own")
    seed: int | None = Field(None, ge=0, description="of generation and split; unset: the run's seed")
    samples: int = Field(2000, ge=50, le=10_000_000, description="spirals, teacher: rows to generate")
    noise: float = Field(0.05, ge=0, le=10, description="spirals: standard deviation of the noise")
    turns: float = Field(1.5, gt=0, le=10, description="spirals: how often each arm goes round")
    features: int = Field(20, ge=1, le=65536, description="teacher: input features")
    classes: int = Field(10, ge=2, le=65536, description="teacher: classes")
    teacher_widths: tuple[int, ...] = Field((32, 32), min_length=1, description="teacher: its hidden layers' units")
    modulus: int = Field(31, ge=2, le=1024, description="tokens: the task is a + b modulo this")

    @model_validator(mode="after")
    def _consistent(self) -> DatasetConfig:
        allowed = _DATASET_FIELDS.get(self.name, set()) | _SHARED_DATASET_FIELDS
        _refuse_foreign(self, "dataset", f"data set {self.name}", allowed, _DATASET_FIELDS)
        if self.validation_fraction + self.test_fraction > 0.9:
            raise InvalidInput("validation and test part leave less than a tenth for training", hint="e.g. 0.2 and 0.2")
        if self.name == "arrays" and self.path is None:
            raise InvalidInput("dataset.path is needed for arrays", hint="a .npz file with arrays inputs and targets")
        if self.name == "cifar10" and self.path is None:
            raise InvalidInput(
                "dataset.path is needed for cifar10",
                hint="the folder of CIFAR-10's binary version, e.g. path: /data/cifar-10-batches-bin",
            )
        return self


class OptimizationConfig(Section):
    """How the host learns."""

    epochs: int = Field(100, ge=1, le=1_000_000)
    batch_size: int = Field(32, ge=1, le=65536)
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = Field(1e-3, gt=0, le=100)
    weight_decay: float = Field(0.0, ge=0, le=10)
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd only")
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_epochs: int = Field(0, ge=0, description="epochs over which the learning rate rises from 0")
    final_fraction: float = Field(0.01, ge=0, le=1, description="cosine: what is left of the learning rate at the end")


class MorphogeneticConfig(Section):
    """Whether, where and how the host may grow."""

    enabled: bool = Field(True, description="false: plain training, as with --baseline")
    spans: tuple[tuple[str, str], ...] | None = Field(
        None, description="slots as pairs of module paths, [[fc1, fc2]]; unset: every span that is found"
    )
    budget_parameters: int | None = Field(None, ge=1, description="parameters that growth may add in all; unset: any")
    probe_samples: int = Field(
        1024, ge=16, le=1_000_000, description="training rows that growth signals are measured on"
    )
    prepare_seconds: float = Field(
        0.0,
        ge=0,
        le=86400,
        description="before epoch 0, wait this long at most for validated kernels that fit the slots",
    )
    decision_wait_seconds: float = Field(
        1.0, ge=0, le=60, description="how long an epoch boundary may wait for Tamiyo's answer or a kernel's bytes"
    )
    native: Literal["off", "trusted"] = Field(
        "off",
        description="trusted: have kernels compiled, and run the code that the forge signed for this machine and torch, where it is "
        "faster; loading it is executing it, results then equal the eager ones up to rounding, and a kernel takes its compiler's "
        "time (12 s on a free core, minutes beside other work): leave prepare_seconds room",
    )
    growth: GrowthSettings = Field(default_factory=GrowthSettings, description="thresholds and durations of growth")
    carve: CarveSettings = Field(
        default_factory=CarveSettings, description="whether and how what no longer pays is taken out; off by default"
    )

    @field_validator("native", mode="before")
    @classmethod
    def _spelled(cls, given: Any) -> Any:
        return "off" if given is False else given  # YAML reads a bare off so


class LoggingConfig(Section):
    """What is said while it trains."""

    level: Literal["debug", "info", "warning", "error"] = "warning"
    every_epochs: int = Field(10, ge=1, description="without a terminal: one line per this many epochs and per event")


class CheckpointConfig(Section):
    """When the run is written to disk."""

    every_epochs: int = Field(1, ge=1)
    keep: int = Field(5, ge=1, le=1000, description="checkpoints kept; older ones are deleted")


class ServicesConfig(Section):
    """Where the platform is and how patient the run is with it."""

    data_dir: Path = Field(
        default_factory=lambda: Path(os.environ.get("ESPER_DATA_DIR") or default_data_dir()),
        description="the platform's data directory, as for esperctl",
    )
    offline: bool = Field(False, description="no platform: decide in process, with the built-in blueprints")
    drain_seconds: float = Field(10.0, ge=0, le=3600, description="at the end, wait this long to deliver what is left")


class TolariaConfig(Section):
    """A training run, whole."""

    name: str = Field("run", description="what runs are called; a number is added when it is taken")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="of initial weights, data order and split")
    threads: int = Field(1, ge=1, le=1024, description="processor threads for tensor work")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N")
    model: ModelConfig = Field(default_factory=ModelConfig)
    dataset: DatasetConfig = Field(default_factory=DatasetConfig)
    optimization: OptimizationConfig = OptimizationConfig()
    morphogenetic: MorphogeneticConfig = Field(default_factory=MorphogeneticConfig)
    logging: LoggingConfig = LoggingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    services: ServicesConfig = Field(default_factory=ServicesConfig)

    @model_validator(mode="after")
    def _named(self) -> TolariaConfig:
        check_name(self.name, "run")
        return self

    @property
    def data_seed(self) -> int:
        """Of generated data and of the split."""
        return self.seed if self.dataset.seed is None else self.dataset.seed


def read_run(what: str, settings: list[str] | None = None) -> TolariaConfig:
    """The configuration that ``what`` (a YAML file or a preset's name) and the ``a.b=value`` settings spell.

    Raises:
        NotFound: neither a file nor a preset.
        InvalidInput: a malformed file or setting, an unknown key, a value that cannot be.
    """
    path = _find(what)
    given = read_yaml(path)
    given.setdefault("name", path.stem.lower().replace("_", "-"))
    for setting in settings or []:
        _lay(given, setting)
    return load(TolariaConfig, given)


def _find(what: str) -> Path:
    path = Path(what)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    known = presets.available()
    if what in known:
        return presets.path(what)
    raise NotFound(f"{what!r} is neither a file nor a preset", hint=nearest(what, known))


def spelled(settings: dict[str, Any]) -> dict[str, Any]:
    """A run's settings, dumped whole, without those that are as by default: what somebody would have to write down."""
    return _differing(settings, TolariaConfig().model_dump(mode="json"))


def _differing(given: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in given.items():
        default = usual.get(name)
        said = _differing(value, default) if isinstance(value, dict) and isinstance(default, dict) else value
        if value != default and said != {}:
            found[name] = said
    return found


def _lay(given: dict[str, Any], setting: str) -> None:
    """Lay one ``a.b=value`` over the mapping; the value is read as YAML."""
    place, sign, text = setting.partition("=")
    keys = place.strip().split(".")
    if not sign or not all(keys):
        raise InvalidInput(
            f"--set {setting!r} is no setting", hint="write section.key=value, e.g. optimization.epochs=20"
        )
    here = given
    for key in keys[:-1]:
        below = here.setdefault(key, {})
        if not isinstance(below, dict):
            raise InvalidInput(f"--set {setting!r}: {key} is no section", hint="write section.key=value")
        here = below
    here[keys[-1]] = parse_yaml(text, f"--set {setting}")


def _refuse_foreign(section: Section, name: str, choice: str, allowed: set[str], fields: dict[str, set[str]]) -> None:
    """Refuse a field that was given although the section's chosen kind has no use for it."""
    foreign = sorted(section.model_fields_set - allowed)
    if foreign:
        owners = ", ".join(sorted(kind for kind, names in fields.items() if foreign[0] in names))
        raise InvalidInput(
            f"{name}.{foreign[0]} means nothing for {choice}", hint=f"it belongs to: {owners}" if owners else ""
        )
