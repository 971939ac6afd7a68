"""Turn ``protos/`` into Python stubs and a descriptor image: ``python protos/generate.py``.

The validation rules' descriptor comes out of the installed protovalidate wheel, so the repository carries no
third-party proto. protoc's imports are absolute from the proto root; they are rewritten to live under ``esper_core.pb``.

    esper_core/pb/esper/<package>/v1/*_pb2.py, *.pyi, *_pb2_grpc.py     stubs
    esper_core/pb/descriptors.binpb                                     every contract as one FileDescriptorSet
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
TARGET = ROOT.parent / "esper_core" / "pb"
WELL_KNOWN = ("any", "descriptor", "duration", "empty", "field_mask", "struct", "timestamp", "wrappers")
ABSOLUTE = re.compile(r"^(from|import) (esper|buf)([. ])", re.MULTILINE)


def vendor_image(path: Path) -> None:
    """Write the FileDescriptorSet of what our contracts import but do not define."""
    from google.protobuf import descriptor_pb2
    from google.protobuf.descriptor_pool import Default
    from protovalidate._gen.buf.validate import validate_pb

    image = descriptor_pb2.FileDescriptorSet()
    for name in WELL_KNOWN:
        __import__(f"google.protobuf.{name}_pb2")
        Default().FindFileByName(f"google/protobuf/{name}.proto").CopyToProto(image.file.add())
    image.file.add().ParseFromString(validate_pb.desc().proto.to_binary())
    path.write_bytes(image.SerializeToString(deterministic=True))


def protoc(arguments: list[str]) -> None:
    """Run the bundled protoc; its messages name file and line."""
    from grpc_tools import protoc as compiler

    if compiler.main(["protoc", *arguments]) != 0:  # type: ignore[no-untyped-call]
        raise SystemExit("protoc refused the contracts; the lines above say where")


def generate(target: Path = TARGET) -> int:
    """Write stubs and image under ``target``, replacing what was there; returns the number of contracts."""
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("esper/**/*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "pb"
        out.mkdir()
        vendor = Path(scratch) / "vendor.binpb"
        vendor_image(vendor)
        common = [f"--descriptor_set_in={vendor}", f"-I{ROOT}"]
        every = [*sources, "buf/validate/validate.proto"]
        protoc([*common, f"--python_out={out}", f"--pyi_out={out}", *every])
        protoc([*common, f"--grpc_python_out={out}", *sources])
        image = out / "descriptors.binpb"
        protoc([*common, "--include_imports", "--include_source_info", f"--descriptor_set_out={image}", *sources])
        for path in [*out.rglob("*.py"), *out.rglob("*.pyi")]:
            path.write_text(ABSOLUTE.sub(r"\1 esper_core.pb.\2\3", path.read_text()))
        for folder in [out, *(path for path in out.rglob("*") if path.is_dir())]:
            (folder / "__init__.py").touch()
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(out, target)
    return len(sources)


if __name__ == "__main__":
    count = generate(Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET)
    print(f"{count} contracts -> {TARGET.relative_to(ROOT.parent)}")
