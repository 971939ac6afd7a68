"""Kernels as the forge hands them over, good and bad: papers, weights and a signed build statement, made by code.

``bad()`` are adversaries that a blueprint, its weights or its papers can express, and one for each module in
``tests.corpus.modules``; ``good()`` is the whole catalogue over a spread of slots. Keys are made for the occasion.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from esper_core.blueprint.build import build, skeleton
from esper_core.blueprint.catalogue import candidates, catalogue
from esper_core.blueprint.interface import BatchNorm, Layout, SlotInterface
from esper_core.blueprint.ir import INPUT, BlueprintIR, Node
from esper_core.errors import InvalidInput
from esper_core.ids import sha256
from esper_core.kernel.manifest import KernelManifest, Provenance, identity
from esper_core.kernel.record import KernelRecord, RejectionReason
from esper_core.kernel.sign import generate_key, public_pem, sign, statement
from esper_core.kernel.trust import TrustList, trust_entry
from services.sandbox import Limits
from tests.corpus.modules import FAULTS
from tests.corpus.slots import FEATURES, SLOTS, TOKENS, described

State = dict[str, Tensor]

LIMITS = Limits(wall_seconds=100.0, cpu_seconds=20.0, memory_bytes=320 << 20)
"""For adversaries: a bomb must not take the machine. The one that is in ``bad`` needs a little more than this."""
IMPATIENT = dataclasses.replace(LIMITS, cpu_seconds=3.0)
"""For those that never answer. Processor time is what an honest kernel has enough of on a busy machine too."""
STUBBORN = frozenset({RejectionReason.TIMEOUT, RejectionReason.MEMORY, RejectionReason.FAILS})
"""What is said of kernels that take their child process with them."""


@dataclass(frozen=True)
class Kernel:
    """A kernel with its papers.

    Attributes:
        name: says what it is.
        reason: why it must be rejected; None when it must not.
    """

    name: str
    manifest: KernelManifest
    blob: bytes
    reason: RejectionReason | None = None


@dataclass
class Forge:
    """A build key of our own, and the trust list that lists it, in a folder of its own."""

    folder: Path
    key: bytes = field(default_factory=generate_key)
    stranger: bytes = field(default_factory=generate_key)

    def __post_init__(self) -> None:
        self.trust.write_text(TrustList(keys=(trust_entry("build", public_pem(self.key)),)).dump())

    @property
    def trust(self) -> Path:
        return self.folder / "trust.json"

    def record(self, kernel: Kernel) -> KernelRecord:
        """As the library would have it, signed; the adversary that is not to be trusted by a key that nobody lists."""
        key = self.stranger if kernel.reason is RejectionReason.UNTRUSTED else self.key
        attestation = sign(statement(kernel.manifest, "build", {}), key)
        return KernelRecord(
            manifest=kernel.manifest, attestations=(attestation,), interface_id=kernel.manifest.interface_id
        )


def good(slots: Iterable[SlotInterface] | None = None, widths: Iterable[int] = (1, 4, 8, 33)) -> Iterator[Kernel]:
    """Every design of the catalogue at every slot, in every width that fits."""
    chosen = tuple(widths)
    for slot in SLOTS if slots is None else slots:
        for name, ir, symbols in candidates(slot, chosen):
            blob = save(build(ir, slot, symbols, seed=5).state_dict())
            manifest = KernelManifest.describe(ir, slot, blob, Provenance(compiler="corpus"), symbols=symbols, seed=5)
            yield Kernel(f"{name} {dict(symbols)} at {described(slot)}", manifest, blob)


def bad() -> Iterator[Kernel]:
    """Every adversary, with what must be said of it."""
    yield from _spoilt()
    yield from _lying()
    yield from _designed()
    for cls, reason in FAULTS.items():
        yield _module(cls.__name__, reason)


def adapter() -> Kernel:
    """The module that the others of ``tests.corpus.modules`` spoil."""
    return dataclasses.replace(_module("Adapter", RejectionReason.FAILS), reason=None)


def _module(name: str, reason: RejectionReason) -> Kernel:
    """Papers of a harmless kernel under which ``tests.corpus.child`` runs the module of that name."""
    ir = catalogue()["bottleneck_mlp"]
    blob = save(build(ir, FEATURES, {"width": 6}).state_dict())
    manifest = KernelManifest.describe(
        ir, FEATURES, blob, Provenance(compiler="corpus"), symbols={"width": 6}, pipeline=name
    )
    return Kernel(f"module {name}", manifest, blob, reason)


def _kernel(
    name: str,
    reason: RejectionReason,
    spoil: Callable[[State], object],
    ir: BlueprintIR | None = None,
    slot: SlotInterface = FEATURES,
) -> Kernel:
    """Honest papers of weights that ``spoil`` has had its hands on."""
    ir = ir or catalogue()["bottleneck_mlp"]
    state = {key: tensor.clone() for key, tensor in build(ir, slot, seed=5).state_dict().items()}
    spoil(state)
    blob = save(state)
    return Kernel(name, KernelManifest.describe(ir, slot, blob, Provenance(compiler="corpus"), seed=5), blob, reason)


def _fill(key: str, value: float, *, one: bool = False) -> Callable[[State], object]:
    def spoil(state: State) -> None:
        (state[key].view(-1)[:1] if one else state[key]).fill_(value)

    return spoil


def _spoilt() -> Iterator[Kernel]:
    """Weights that are not what they should be."""
    normed = FEATURES.model_copy(update={"norm": BatchNorm()})
    reason = RejectionReason
    yield _kernel("one NaN weight", reason.WEIGHTS_NOT_FINITE, _fill("A.weight", float("nan"), one=True))
    yield _kernel("NaN weights", reason.WEIGHTS_NOT_FINITE, _fill("B.weight", float("nan")))
    yield _kernel("an infinite weight", reason.WEIGHTS_NOT_FINITE, _fill("B.weight", float("inf"), one=True))
    yield _kernel("not silent at birth", reason.NOT_SILENT, _fill("B.weight", 0.5, one=True))
    yield _kernel("hardly silent at birth", reason.NOT_SILENT, _fill("B.bias", 1e-7, one=True))
    yield _kernel("exploding output", reason.EXPLODES, _fill("A.weight", 1e8))
    yield _kernel("weights that overflow", reason.OUTPUT_NOT_FINITE, _fill("A.weight", 3e38))
    yield _kernel("dead units", reason.VANISHES, _fill("A.bias", -1e9))
    yield _kernel("negative variance", reason.OUTPUT_NOT_FINITE, _fill("norm.running_var", -1.0), slot=normed)


def _awakening(state: State) -> State:
    """What ``services.urabrask.safety.awaken`` adds to each weight: its draw is no secret from an adversary."""
    draw = torch.Generator().manual_seed(1)
    added = {}
    for key, value in state.items():
        scale = value[0].numel() ** -0.5 if value.dim() > 1 else 0.1
        added[key] = torch.randn(value.shape, generator=draw) * scale
    return added


def _node(name: str, op: str, *inputs: str, **attributes: str) -> Node:
    return Node(name=name, op=op, inputs=inputs, attributes=attributes)


def _ir(name: str, *nodes: Node, layout: Layout = Layout.FEATURES) -> BlueprintIR:
    return BlueprintIR(name=name, nodes=nodes, output=nodes[-1].name, layouts=(layout,))


def _nothing(state: State) -> None:
    """The design alone is bad enough."""


def _designed() -> Iterator[Kernel]:
    """Designs that the op registry permits and nobody wants."""
    reason = RejectionReason
    leave = _node("B", "linear", "last", out="out_width")
    powers = _ir(
        "powers",
        _node("p", "multiply", *[INPUT] * 8),
        _node("q", "multiply", "p", "p"),
        _node("mix", "linear", "q", out="6"),
        _node("last", "activation", "mix", kind="tanh"),
        leave,
    )
    yield _kernel("NaN for large inputs", reason.OUTPUT_NOT_FINITE, _nothing, powers)
    steep = _ir(
        "steep",
        _node("p", "multiply", *[INPUT] * 8),
        _node("q", "multiply", "p", "p"),
        _node("r", "multiply", "q", INPUT),
        _node("last", "activation", "r", kind="tanh"),
        _node("A", "linear", INPUT, out="in_width"),
        _node("both", "add", "last", "A"),
        _node("B", "linear", "both", out="out_width"),
    )
    yield _kernel("NaN gradient for large inputs", reason.GRADIENT_NOT_FINITE, _nothing, steep)
    scales = _ir("scales", _node("s1", "scale", INPUT), _node("last", "scale", "s1"), leave)
    yield _kernel("exploding gradient", reason.EXPLODES, _exploding, scales)
    gated = _ir(
        "gated",
        _node("A", "linear", INPUT, out="in_width"),
        _node("gate", "activation", "A", kind="sigmoid"),
        _node("last", "multiply", INPUT, "gate"),
        leave,
    )
    yield _kernel("vanishing gradient", reason.VANISHES, _fill("A.bias", -60.0), gated)
    ahead = _ir(
        "ahead",
        _node("norm", "layer_norm", INPUT),
        _node("mix", "attention", "norm", width="8", causal="no", out="out_width"),
        layout=Layout.TOKENS,
    )
    yield _kernel("attention to later tokens", reason.LEAKS_FUTURE, _nothing, ahead, TOKENS)
    averaged = _ir(
        "averaged",
        _node("mean", "global_average_pool", INPUT),
        _node("gate", "activation", "mean", kind="sigmoid"),
        _node("last", "multiply", INPUT, "gate"),
        leave,
        layout=Layout.TOKENS,
    )
    yield _kernel("a mean over all tokens", reason.LEAKS_FUTURE, _nothing, averaged, TOKENS)
    wide = FEATURES.model_copy(update={"layout": Layout.IMAGE, "in_size": (64, 64), "out_size": (64, 64)})
    tower = [_node(f"c{n}", "conv", f"c{n - 1}" if n else INPUT, out="128", kernel="7", padding="3") for n in range(3)]
    endless = _ir("endless", *tower, _node("B", "conv", "c2", out="out_width"), layout=Layout.IMAGE)
    yield _kernel("a hang", reason.TIMEOUT, _nothing, endless, wide)
    long = FEATURES.model_copy(update={"layout": Layout.TOKENS, "in_size": (1300,), "out_size": (1300,)})
    swelling = _ir(
        "swelling",
        _node("A", "linear", INPUT, out="4096"),
        _node("last", "activation", "A", kind="tanh"),
        leave,
        layout=Layout.TOKENS,
    )
    yield _kernel("a memory bomb", reason.MEMORY, _nothing, swelling, long)


def _exploding(state: State) -> None:
    """Two factors that cancel: moderate output, and a gradient of the second as large as the first."""
    state["s1.weight"].fill_(1e8)
    state["last.weight"].fill_(1e-8)
    added = _awakening(state)
    for key in ("s1.weight", "last.weight"):
        state[key].sub_(added[key])


def _lying() -> Iterator[Kernel]:
    """Papers and bytes that contradict one another."""
    reason = RejectionReason
    honest = _kernel("", reason.MANIFEST, _nothing)
    fields = honest.manifest.model_dump()
    yield Kernel(
        "a manifest with fewer parameters",
        KernelManifest.model_validate(fields | {"parameters": 3}),
        honest.blob,
        reason.MANIFEST,
    )
    yield Kernel(
        "a manifest with fewer FLOPs",
        KernelManifest.model_validate(fields | {"flops": 1}),
        honest.blob,
        reason.MANIFEST,
    )
    yield dataclasses.replace(honest, name="signed by a stranger", reason=reason.UNTRUSTED)
    larger = FEATURES.model_copy(update={"in_width": 24})
    other = _kernel("", reason.ARTIFACT, _nothing, slot=larger)
    for name, blob in (
        ("tensors of other shapes", other.blob),
        ("a blob cut short", honest.blob[:-4]),
        ("no tensors at all", b"\xff" * 8 + honest.blob[8:]),
        ("a tensor of another type", save({key: t.double() for key, t in _state(honest).items()})),
        ("a tensor too many", save(_state(honest) | {"C.weight": torch.ones(3, 3)})),
    ):
        yield Kernel(name, _describe(honest.manifest, blob), blob, reason.ARTIFACT)
    yield dataclasses.replace(
        honest, name="bytes changed on the way", blob=_flipped(honest.blob), reason=reason.ARTIFACT
    )
    yield _oversized()


def _state(kernel: Kernel) -> State:
    from safetensors.torch import load

    return dict(load(kernel.blob))


def _flipped(blob: bytes) -> bytes:
    """The last weight with its lowest bit changed."""
    return blob[:-4] + bytes([blob[-4] ^ 1]) + blob[-3:]


def _describe(like: KernelManifest, blob: bytes) -> KernelManifest:
    return KernelManifest.describe(like.blueprint, like.interface, blob, like.provenance, symbols=like.symbols)


def _oversized() -> Kernel:
    """More parameters than a kernel may have, with papers that say so: no honest forge would have written them."""
    ir = _ir("bomb", *[_node(f"L{n}", "linear", f"L{n - 1}" if n else INPUT, out="1048576") for n in range(2)],
             _node("B", "linear", "L1", out="out_width"))  # fmt: skip
    try:
        skeleton(ir, FEATURES)
    except InvalidInput:
        pass
    else:
        raise AssertionError("the bomb fits")
    honest = _kernel("", RejectionReason.OVERSIZED, _nothing)
    fields: Mapping[str, object] = honest.manifest.model_dump() | {
        "blueprint": ir,
        "blueprint_id": ir.id,
        "symbols": {},
        "kernel_id": identity(ir.id, FEATURES.id, {}, sha256(honest.blob)),
    }
    return Kernel(
        "a design beyond all limits", KernelManifest.model_validate(fields), honest.blob, RejectionReason.OVERSIZED
    )
