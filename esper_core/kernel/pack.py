"""Kernel weights as a safetensors blob and back: the only place where a stranger's bytes become tensors.

Every byte is covered by the manifest's digest, and names, shapes and dtypes must be those the blueprint gives, so a
blob can neither execute nor surprise. It does not judge what the weights compute, nor who made them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from esper_core.blueprint.build import KernelModule, skeleton
from esper_core.errors import Corrupt, InvalidInput
from esper_core.ids import sha256
from esper_core.kernel.manifest import MAX_BLOB_BYTES, REBUILD, KernelManifest


def pack(module_state: Mapping[str, Tensor]) -> bytes:
    """The blob of a kernel's ``state_dict()``; equal states give equal bytes.

    Raises:
        InvalidInput: when a tensor is not finite, or the blob would exceed 1 GiB.
    """
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module_state.items()}
    broken = _not_finite(state)
    if broken:
        raise InvalidInput(f"tensor {broken!r} has values that are not finite", hint="such a kernel cannot be stored")
    blob = safetensors.save(state)
    if len(blob) > MAX_BLOB_BYTES:
        raise InvalidInput(f"a blob of {len(blob)} bytes is too large", hint=f"at most {MAX_BLOB_BYTES} bytes")
    return blob


def unpack(blob: bytes, manifest: KernelManifest) -> dict[str, Tensor]:
    """The tensors in ``blob``, once it is the one that ``manifest`` describes. They own their memory, on the CPU.

    Raises:
        Corrupt: when size, digest, names, shapes, dtypes or the parameter count differ, or a value is not finite.
    """
    return _checked(blob, manifest, skeleton(manifest.blueprint, manifest.interface, manifest.symbols))


def load(blob: bytes, manifest: KernelManifest) -> KernelModule:
    """The kernel's module on the CPU with the weights in ``blob``.

    Raises:
        Corrupt: as :func:`unpack`.
        InvalidInput: when this build cannot make the blueprint.
    """
    module = skeleton(manifest.blueprint, manifest.interface, manifest.symbols)
    module.load_state_dict(_checked(blob, manifest, module), assign=True)
    return module


def finite(blob: bytes) -> bool:
    """Whether a blob holds no NaN and no infinity, whatever it is the blob of; True for what is no safetensors file."""
    try:
        return not _not_finite(safetensors.load(blob))
    except (SafetensorError, KeyError):
        return True


def _checked(blob: bytes, manifest: KernelManifest, module: KernelModule) -> dict[str, Tensor]:
    name = manifest.kernel_id
    if len(blob) != manifest.blob_bytes:
        raise Corrupt(f"{name}: {len(blob)} bytes instead of {manifest.blob_bytes}", hint=REBUILD)
    if sha256(blob) != manifest.blob_sha256:
        raise Corrupt(f"{name}: the blob does not match its digest", hint=REBUILD)
    try:
        state = safetensors.load(blob)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that safetensors knows and torch does not
        raise Corrupt(f"{name}: the blob is no safetensors file", hint=REBUILD) from error
    expected = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in module.state_dict().items()}
    found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in state.items()}
    if found != expected or module.analysis.parameters != manifest.parameters:
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        raise Corrupt(f"{name}: the blob does not fit its blueprint at {wrong[:3] or 'parameters'}", hint=REBUILD)
    broken = _not_finite(state)
    if broken:
        raise Corrupt(f"{name}: tensor {broken!r} has values that are not finite", hint=REBUILD)
    return {key: tensor.clone() for key, tensor in state.items()}


def _not_finite(state: Mapping[str, Tensor]) -> str:
    """Name of the first tensor with a NaN or an infinity; empty when there is none."""
    return next((name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())), "")
