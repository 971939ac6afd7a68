"""Blobs: the same bytes for the same weights, and nothing but those comes back."""

import json
import math
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from esper_core.blueprint.build import build, example_input
from esper_core.errors import Corrupt, InvalidInput
from esper_core.ids import sha256
from esper_core.kernel.manifest import KernelManifest, identity
from esper_core.kernel.pack import load, pack, unpack


def forged(kernel: Any, blob: bytes, **changes: Any) -> KernelManifest:
    """A consistent manifest for any blob, as a hostile builder would write it."""
    manifest = kernel.manifest
    digest = sha256(blob)
    name = identity(manifest.blueprint_id, manifest.interface.id, manifest.symbols, digest)
    fields = {**manifest.model_dump(), "kernel_id": name, "blob_sha256": digest, "blob_bytes": len(blob), **changes}
    return KernelManifest.model_validate(fields)


def state(kernel: Any) -> dict[str, torch.Tensor]:
    return unpack(kernel.blob, kernel.manifest)


def test_equal_weights_give_equal_bytes_in_any_order(kernel: Any) -> None:
    tensors = state(kernel)
    assert pack(tensors) == kernel.blob == pack(dict(reversed(tensors.items())))


def test_a_loaded_kernel_computes_what_the_built_one_does(kernel: Any) -> None:
    manifest = kernel.manifest
    built = build(manifest.blueprint, manifest.interface, manifest.symbols, seed=1)
    loaded = load(kernel.blob, manifest)
    x = example_input(manifest.interface, batch=4, seed=1)
    for module in (built, loaded):
        with torch.no_grad():
            module.state_dict()["B.weight"].fill_(0.5)
    assert torch.equal(built(x), loaded(x))
    assert torch.count_nonzero(loaded(x))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@settings(deadline=None)
@given(data=st.data())
def test_every_flipped_bit_is_noticed(kernel: Any, data: st.DataObject) -> None:
    at, bit = data.draw(st.integers(0, len(kernel.blob) - 1)), data.draw(st.integers(0, 7))
    blob = bytearray(kernel.blob)
    blob[at] ^= 1 << bit
    with pytest.raises(Corrupt):
        unpack(bytes(blob), kernel.manifest)


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_truncated_and_padded_blobs_are_corrupt(kernel: Any, cut: int) -> None:
    for blob in (kernel.blob[:cut], kernel.blob + b"\0"):
        with pytest.raises(Corrupt):
            unpack(blob, kernel.manifest)


@settings(deadline=None)
@given(noise=st.binary(max_size=40), at=st.integers(0, 1100))
def test_a_hostile_builders_bytes_never_crash(kernel: Any, noise: bytes, at: int) -> None:
    blob = kernel.blob[:at] + noise + kernel.blob[at + len(noise) :]
    try:
        found = unpack(blob, forged(kernel, blob))
    except Corrupt:
        return
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in state(kernel).items()}
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "C64", "BOOL", "F99", ""])
def test_strange_dtypes_are_corrupt(kernel: Any, dtype: str) -> None:
    header = json.dumps({"A.weight": {"dtype": dtype, "shape": [8], "data_offsets": [0, 8]}}).encode()
    blob = struct.pack("<Q", len(header)) + header + b"\0" * 8
    with pytest.raises(Corrupt):
        unpack(blob, forged(kernel, blob))


@pytest.mark.parametrize("case", ["missing", "extra", "shape", "dtype", "renamed", "nan", "inf"])
def test_a_blob_that_does_not_fit_its_blueprint_is_corrupt(kernel: Any, case: str) -> None:
    tensors = state(kernel)
    match case:
        case "missing":
            del tensors["A.bias"]
        case "extra":
            tensors["C.weight"] = torch.zeros(2)
        case "shape":
            tensors["A.weight"] = tensors["A.weight"].T.contiguous()
        case "dtype":
            tensors["A.weight"] = tensors["A.weight"].double()
        case "renamed":
            tensors["a.weight"] = tensors.pop("A.weight")
        case "nan" | "inf":
            tensors["A.weight"][1, 2] = math.nan if case == "nan" else -math.inf
    blob = save(tensors)
    with pytest.raises(Corrupt) as caught:
        unpack(blob, forged(kernel, blob))
    assert caught.value.hint


@pytest.mark.parametrize("field", ["parameters", "blob_bytes"])
def test_a_wrong_count_is_corrupt(kernel: Any, field: str) -> None:
    with pytest.raises(Corrupt):
        unpack(kernel.blob, forged(kernel, kernel.blob, **{field: 1}))


def test_weights_that_are_not_finite_are_not_packed(kernel: Any) -> None:
    with pytest.raises(InvalidInput, match=r"A\.bias"):
        pack({**state(kernel), "A.bias": torch.full((5,), math.inf)})
