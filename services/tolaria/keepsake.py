"""What a finished run keeps of its network: enough to have it again long after, whatever became of data and platform.

    model.safetensors      the weights; folded layers are simply wider
    morphology.json        what the weights do not say: the host, and the kernels that run beside it
    held-out.safetensors   a few test rows and what the network gave for them

A network that is recalled has to give the same for the held-out rows before anyone gets it.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from esper_core.blueprint.build import KernelModule, build
from esper_core.blueprint.interface import SlotInterface
from esper_core.blueprint.ir import BlueprintIR
from esper_core.errors import Conflict, Corrupt, EsperError
from esper_core.nn.chance import undisturbed
from esper_core.nn.checkpoint import write_atomic
from esper_core.nn.export.plain import grafts
from esper_core.nn.graft import Graft
from esper_core.nn.widen import conform
from services.tolaria import hosts
from services.tolaria.config import ModelConfig
from services.tolaria.datasets import Data

WEIGHTS, MORPHOLOGY, HELD_OUT = "model.safetensors", "morphology.json", "held-out.safetensors"
ROWS = 16
TOLERANCE = 1e-5
"""Of a recalled network's outputs, relative to the largest: another machine may sum in another order."""
_AGAIN = "train it again, or give it --resume: a finished run then only writes its files anew"


class BesideKernel(BaseModel):
    """A kernel that could not be folded; its weights are the sink's ``graft.kernel`` in the weights file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    sink: str
    alpha: float
    blueprint: BlueprintIR
    interface: SlotInterface
    symbols: dict[str, int]


class Standardisation(BaseModel):
    """What was done to raw inputs, ``(raw - mean) / scale``, per feature or per channel."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: tuple[float, ...]
    scale: tuple[float, ...]


class Morphology(BaseModel):
    """How a network is built, its widths apart."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["esper.morphology/1"] = "esper.morphology/1"
    weights_sha256: str
    held_out_sha256: str
    model: dict[str, Any]
    sample_shape: tuple[int, ...]
    tokens: int
    outputs: int
    beside: tuple[BesideKernel, ...] = ()
    standardisation: Standardisation | None = None


@dataclass(frozen=True)
class Recalled:
    """A finished run's network.

    Attributes:
        model: on the CPU, in evaluation mode.
        inputs: held-out rows, standardised.
        morphology: how it is built.
    """

    model: nn.Module
    inputs: Tensor
    morphology: Morphology


def keep(directory: Path, config: ModelConfig, data: Data, model: nn.Module) -> None:
    """Write the three files; the morphology last, so that it never speaks of others."""
    twin = copy.deepcopy(model).cpu().eval()
    inputs, _ = data.test.take(torch.arange(min(ROWS, len(data.test)), device=data.test.inputs.device))
    inputs = inputs.cpu().contiguous()
    weights = safetensors.torch.save({name: value.contiguous() for name, value in twin.state_dict().items()})
    held_out = safetensors.torch.save({"inputs": inputs, "outputs": _evaluate(twin, inputs)})
    paths = {id(module): path for path, module in twin.named_modules()}
    morphology = Morphology(
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        held_out_sha256=hashlib.sha256(held_out).hexdigest(),
        model=config.own,
        sample_shape=data.sample_shape,
        tokens=data.tokens,
        outputs=data.outputs,
        beside=tuple(_described(graft, paths) for graft in grafts(twin)),
        standardisation=None if data.tokens else _standardisation(data),
    )
    write_atomic(directory / WEIGHTS, weights)
    write_atomic(directory / HELD_OUT, held_out)
    write_atomic(directory / MORPHOLOGY, (morphology.model_dump_json(indent=1) + "\n").encode())


def recall(directory: Path) -> Recalled:
    """The network that ``keep`` kept.

    Raises:
        Conflict: the run has not finished, or finished before morphologies were kept.
        Corrupt: a file is damaged, or the rebuilt network does not give what was kept.
    """
    if not (directory / WEIGHTS).exists():
        raise Conflict(f"run {directory.name} has not finished", hint="go on with it: --resume")
    if not (directory / MORPHOLOGY).exists():
        raise Conflict(f"run {directory.name} kept its weights but not how they are joined", hint=_AGAIN)
    try:
        morphology = Morphology.model_validate_json((directory / MORPHOLOGY).read_bytes())
        config = ModelConfig.model_validate(morphology.model)
    except (ValidationError, EsperError) as problem:
        raise Corrupt(f"{directory / MORPHOLOGY} is damaged: {problem}", hint=_AGAIN) from None
    weights = _read(directory / WEIGHTS, morphology.weights_sha256)
    held_out = _read(directory / HELD_OUT, morphology.held_out_sha256)
    with undisturbed():
        model = hosts.build(config, morphology.sample_shape, morphology.tokens, morphology.outputs).eval()
    for kernel in morphology.beside:
        _graft(model, kernel)
    try:
        conform(model, weights)
        model.load_state_dict(weights)
    except (RuntimeError, Corrupt) as problem:
        raise Corrupt(f"{directory / WEIGHTS} does not fit its morphology: {problem}", hint=_AGAIN) from None
    _check(directory.name, _evaluate(model, held_out["inputs"]), held_out["outputs"])
    return Recalled(model, held_out["inputs"], morphology)


def _evaluate(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return cast(Tensor, model(inputs))


def _described(graft: Graft, paths: dict[int, str]) -> BesideKernel:
    kernel = cast(KernelModule, graft.kernel)
    return BesideKernel(
        source=paths[id(graft.source)],
        sink=paths[id(graft.sink)],
        alpha=float(graft.alpha),
        blueprint=kernel.ir,
        interface=kernel.interface,
        symbols=dict(kernel.symbols),
    )


def _standardisation(data: Data) -> Standardisation:
    mean, scale = (values.flatten().tolist() for values in (data.train.mean, data.train.scale))
    return Standardisation(mean=mean, scale=scale)


def _read(path: Path, digest: str) -> dict[str, Tensor]:
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise Corrupt(f"{path} does not match its digest", hint=_AGAIN)
        return safetensors.torch.load(data)
    except (OSError, SafetensorError) as problem:
        raise Corrupt(f"{path} cannot be read: {problem}", hint=_AGAIN) from None


def _graft(model: nn.Module, kernel: BesideKernel) -> None:
    """Put a kernel beside its span, as it was when the run finished."""
    try:
        source, sink = model.get_submodule(kernel.source), model.get_submodule(kernel.sink)
    except AttributeError as problem:
        raise Corrupt(f"the host has no such span: {problem}", hint=_AGAIN) from None
    module = build(kernel.blueprint, kernel.interface, kernel.symbols)
    graft = Graft(source, sink, module, like=next(model.parameters()))
    graft.alpha.fill_(kernel.alpha)
    graft.attach()
    sink.add_module("graft", graft.eval())


def _check(run: str, found: Tensor, kept: Tensor) -> None:
    difference, scale = float((found - kept).abs().max()), float(kept.abs().max())
    if not difference <= TOLERANCE * scale:
        raise Corrupt(
            f"the network of run {run}, rebuilt, gives outputs that differ by {difference:.3g} from those it gave",
            hint=_AGAIN,
        )
