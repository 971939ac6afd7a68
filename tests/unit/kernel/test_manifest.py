"""Manifests: ids that follow from the contents, on the wire and off it."""

from typing import Any

import pytest

from esper_core.errors import Corrupt, InvalidInput
from esper_core.kernel.manifest import KernelManifest
from esper_core.kernel.record import KernelStatus, Measurement
from esper_core.pb.esper.core.v1 import kernel_pb2
from esper_core.rpc.convert import from_proto, to_proto


def test_figures_come_from_the_blueprint_and_the_blob(kernel: Any) -> None:
    manifest = kernel.manifest
    assert manifest.parameters == 12 * 5 + 5 + 5 * 10 + 10
    assert manifest.flops == 2 * 12 * 5 + 5 + 2 * 5 * 10
    assert manifest.blob_bytes == len(kernel.blob)
    assert manifest.symbols == {"width": 5}


def test_the_id_is_settled_by_what_the_kernel_does(kernel: Any, other: Any) -> None:
    assert kernel.manifest.kernel_id != other.manifest.kernel_id
    later = kernel.manifest.provenance.model_copy(update={"build_seconds": 99.0})
    same = KernelManifest.describe(
        kernel.manifest.blueprint, kernel.manifest.interface, kernel.blob, later, symbols={"width": 5}
    )
    assert same.kernel_id == kernel.manifest.kernel_id


def test_it_survives_the_wire_byte_for_byte(kernel: Any) -> None:
    manifest = kernel.manifest.model_copy(update={"seed": 2**64 - 1})
    sent = to_proto(manifest, kernel_pb2.KernelManifest).SerializeToString()
    found = from_proto(kernel_pb2.KernelManifest.FromString(sent), KernelManifest)
    assert found == manifest
    assert found.canonical() == manifest.canonical()


def test_json_and_back(kernel: Any) -> None:
    assert KernelManifest.model_validate_json(kernel.manifest.canonical()) == kernel.manifest


@pytest.mark.parametrize(
    "change",
    [
        {"kernel_id": "kernel-" + "0" * 64},
        {"blueprint_id": "blueprint-" + "0" * 64},
        {"blob_sha256": "0" * 64},
        {"symbols": {"width": 6}},
        {"symbols": {}},
    ],
)
def test_contents_that_contradict_the_ids_are_corrupt(kernel: Any, change: dict[str, Any]) -> None:
    with pytest.raises(Corrupt) as caught:
        KernelManifest.model_validate({**kernel.manifest.model_dump(), **change})
    assert caught.value.hint


@pytest.mark.parametrize("part", ["blueprint", "interface"])
def test_swapped_parts_are_corrupt(kernel: Any, part: str) -> None:
    fields = kernel.manifest.model_dump()
    swapped = {
        "blueprint": {**fields["blueprint"], "name": "y"},
        "interface": {**fields["interface"], "hidden_width": 4},
    }
    with pytest.raises(Corrupt):
        KernelManifest.model_validate({**fields, part: swapped[part]})


def test_a_blueprint_that_does_not_fit_has_no_manifest(kernel: Any) -> None:
    manifest = kernel.manifest
    with pytest.raises(InvalidInput):
        KernelManifest.describe(manifest.blueprint, manifest.interface, b"", manifest.provenance, symbols={"depth": 2})


def test_statuses_and_measurements_are_twins_of_the_contract() -> None:
    assert {f"KERNEL_STATUS_{status.name}": int(status) for status in KernelStatus} == {
        name: number for name, number in kernel_pb2.KernelStatus.items() if number
    }
    figures = Measurement(
        batch=8, forward_seconds=0.25, forward_seconds_p99=0.5, backward_seconds=1.0, peak_memory_bytes=2**40,
        precision_drift=1e-7, gradient_norm=1.5, deterministic=True, repetitions=30, target="cpu",
    )  # fmt: skip
    assert from_proto(to_proto(figures, kernel_pb2.Measurement), Measurement) == figures
