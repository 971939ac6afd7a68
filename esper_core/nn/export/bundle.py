"""Exporting: a network in, a directory out whose every file was read back and gives the network's own outputs.

    model.safetensors, architecture.json, load.py   weights, a code-free description, and what rebuilds a module from the two
    model.pt2                                       for torch.export.load
    model.onnx                                      for any ONNX runtime
    export.json                                     what stands beside it, and how near it came

Nothing in the directory needs Esper.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from esper_core.errors import AlreadyExists, Corrupt, Exhausted, InvalidInput, nearest
from esper_core.nn.chance import undisturbed
from esper_core.nn.export.formats import WRITERS, require
from esper_core.nn.export.plain import on_cpu, plain
from esper_core.nn.export.program import batch_of, program

FORMATS = tuple(WRITERS)
TOLERANCE = 1e-5
"""Largest difference of an output, relative to the largest output."""
MANIFEST = "export.json"
MANIFEST_FORMAT = "esper.export/1"


@dataclass(frozen=True)
class Exported:
    """One format, written and compared.

    Attributes:
        format: its name.
        path: the file to load.
        max_abs_diff: largest |its output - the network's| over the example rows.
        tolerance: what that had to stay within.
        bytes: of the format's files together.
    """

    format: str
    path: Path
    max_abs_diff: float
    tolerance: float
    bytes: int

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {"path": str(self.path)}


def export(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    directory: str | os.PathLike[str],
    formats: Sequence[str] = FORMATS,
    *,
    facts: Mapping[str, Any] | None = None,
) -> list[Exported]:
    """Write ``model`` under ``directory``, once per format, each compared with the model on the example and on its first row.

    Args:
        model: what ``grower.finish()`` gave, or any network; it is not changed. Kernels beside the host are part of it.
        example_inputs: a batch of real rows, a tensor or a tuple of them with a common first dimension.
        directory: is made; an earlier export there is replaced whole, anything else is left alone.
        formats: of ``FORMATS``.
        facts: goes into export.json too.

    Returns:
        One entry per format, in the order asked for.

    Raises:
        InvalidInput: an unknown format, or inputs that are no batch the model takes.
        AlreadyExists: the directory holds something that is no export.
        Unsupported: the model cannot be expressed, or a package of the extra ``export`` is missing.
        Corrupt: a written file does not give the model's outputs; nothing is left behind.
        Exhausted: the disk cannot be written.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    wanted = _checked_formats(formats)
    target = Path(os.path.abspath(directory))
    _check_target(target)
    batch_of(inputs)
    inputs = tuple(value.detach().cpu() for value in inputs)
    reference, bare = on_cpu(model), plain(model)
    expected = [_outputs(reference, inputs)]
    traced = program(bare, inputs)
    batches = [inputs, tuple(value[:1] for value in inputs)]
    expected.append(_outputs(reference, batches[1]))
    with _replacing(target) as folder:
        done = []
        for name in wanted:
            again = WRITERS[name](bare, traced, folder)
            found = [again.run(batch) for batch in batches]
            difference, tolerance = _compared(name, found, expected)
            size = sum((folder / file).stat().st_size for file in again.files)
            done.append(Exported(name, target / again.files[0], difference, tolerance, size))
        _write_manifest(folder, inputs, done, facts or {})
    return done


def _checked_formats(formats: Sequence[str]) -> list[str]:
    wanted = list(dict.fromkeys(formats))
    for name in wanted:
        if name not in WRITERS:
            raise InvalidInput(f"there is no format {name!r}", hint=nearest(name, FORMATS))
        require(name)
    if not wanted:
        raise InvalidInput("no format is asked for", hint=f"formats: {', '.join(FORMATS)}")
    return wanted


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The model's output tensors, flat."""
    try:
        with torch.no_grad(), undisturbed():
            leaves = tree_leaves(model(*inputs))
    except (RuntimeError, TypeError, ValueError, IndexError) as problem:
        words = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise InvalidInput(
            f"the example inputs do not fit {type(model).__name__}: {words}", hint="pass a batch shaped as in training"
        ) from problem
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _compared(name: str, found: list[list[Tensor]], expected: list[list[Tensor]]) -> tuple[float, float]:
    """(largest absolute difference, tolerance) over all batches.

    Raises:
        Corrupt: it is larger, or shapes differ; also when an output is not finite, which nothing can be compared with.
    """
    worst, scale = 0.0, 0.0
    for theirs, ours in zip(found, expected, strict=True):
        if [leaf.shape for leaf in theirs] != [leaf.shape for leaf in ours]:
            raise Corrupt(f"{name}: the exported network's outputs have other shapes", hint="please report this")
        for their, our in zip(theirs, ours, strict=True):
            if not bool(torch.isfinite(our).all()):
                raise InvalidInput("the network's own outputs are not finite", hint="export it where it works")
            scale = max(scale, float(our.double().abs().max()))
            worst = max(worst, float((their.double() - our.double()).abs().nan_to_num(torch.inf).max()))
    tolerance = TOLERANCE * scale
    if not worst <= tolerance:
        raise Corrupt(
            f"{name}: outputs differ by {worst:.3g} from the network's, more than {tolerance:.3g}",
            hint="nothing was written; is the network in float32 and deterministic in evaluation mode?",
        )
    return worst, tolerance


def _write_manifest(folder: Path, inputs: tuple[Tensor, ...], done: list[Exported], facts: Mapping[str, Any]) -> None:
    manifest = {
        "format": MANIFEST_FORMAT,
        "files": sorted([*(path.name for path in folder.iterdir()), MANIFEST]),
        "inputs": [
            {"dtype": str(value.dtype).removeprefix("torch."), "shape": [None, *value.shape[1:]]} for value in inputs
        ],
        "compared_rows": batch_of(inputs),
        "formats": [entry.as_json() | {"path": entry.path.name} for entry in done],
        **facts,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _check_target(target: Path) -> None:
    """Only an empty place or an earlier export may be written over."""
    if not target.exists():
        return
    names = {path.name for path in target.iterdir()} if target.is_dir() else {target.name}
    names.discard("__pycache__")  # of load.py
    if target.is_dir() and (not names or names <= _manifested(target)):
        return
    raise AlreadyExists(f"{target} holds something that is no export", hint="choose another directory with --out")


def _manifested(target: Path) -> set[str]:
    """Files that the manifest in a directory lists; none without one."""
    try:
        manifest = json.loads((target / MANIFEST).read_bytes())
        return set(manifest["files"]) if manifest["format"] == MANIFEST_FORMAT else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A new directory that takes ``target``'s place when all went well, and is gone otherwise."""
    fresh = target.with_name(f".{target.name}.{os.getpid()}.new")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        yield fresh
        if target.exists():
            os.rename(target, old)
        os.rename(fresh, target)
    except OSError as problem:
        raise Exhausted(f"{target} cannot be written: {problem.strerror}", hint="choose another directory") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if old.exists() and not target.exists():
            os.rename(old, target)
        shutil.rmtree(old, ignore_errors=True)
