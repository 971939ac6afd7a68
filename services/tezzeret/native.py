"""Natively compiled kernels, in a child process: forward and backward as shared objects, and whether they pay.

The joint graph of forward and backward is traced once, its number of rows a symbol; it is cut where the least has to be kept
between the two, and each half is compiled ahead of time by AOTInductor (torch's own; it runs the machine's C++ compiler), for
any number of rows in ``ROWS_TAKEN``. Algorithm of the cut: torch's
min-cut rematerialisation partitioner. Whether the result is worth shipping is measured here, against the eager module, on
the machine that it is for. Knows no key and no network.
"""

from __future__ import annotations

import copy
import operator
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim

from esper_core.blueprint.build import KernelModule, build, example_input
from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.blueprint.ir import BlueprintIR
from esper_core.errors import EsperError, Unsupported
from esper_core.kernel.manifest import NativeFigures
from esper_core.nn.native import PARITY_LIMIT, PARITY_ROWS, Native, Passes, Place, pack, parity
from esper_core.nn.native import Layout as Form
from services.sandbox import Job, serve
from services.tezzeret.graph import joint

ROWS_TAKEN = (2, 65536)
"""Batches that compiled code takes; torch does not trace one row as it does many."""
ROUNDS = 15
BLOCK_SECONDS = 0.02
SHORTEST_SECONDS = 1e-6
"""No pass is quicker; bounds the work if a clock does not move."""
PAYS = 0.97
"""A native step must take less than this share of an eager one to be shipped: below what noise does to a median."""


def compile_native(job: Job) -> Job:
    """Compile one kernel, compare and time it, and write its native part to ``job["native"]`` where that pays.

    Args:
        job: ``blueprint``, ``interface``, ``symbols``, ``seed``, ``rows`` to time it at and ``native``, the path to write to.

    Returns:
        ``{"figures": NativeFigures}``; a kernel that cannot be compiled has a reason there, not an error.
    """
    ir = BlueprintIR.model_validate(job["blueprint"])
    interface = SlotInterface.model_validate(job["interface"])
    module = build(ir, interface, job["symbols"], job["seed"])
    started = time.perf_counter()
    try:
        blob = compiled(module, example_input(interface, job["rows"], seed=0))
    except EsperError as error:
        figures = NativeFigures(rows=job["rows"], reason=error.message[:200])
        return {"figures": figures.model_dump(mode="json")}
    figures = _judged(blob, module, job["rows"], time.perf_counter() - started)
    if figures.shipped:
        Path(job["native"]).write_bytes(blob)
    return {"figures": figures.model_dump(mode="json")}


def compiled(module: KernelModule, x: Tensor) -> bytes:
    """The native part of ``module`` for batches like ``x``, whatever their number of rows.

    Raises:
        Unsupported: it keeps statistics, its slot leaves the number of positions open, or torch's compiler does not take its
            graph.
    """
    if module.interface.layout is Layout.TOKENS and not module.interface.in_size:
        raise Unsupported("its slot leaves the number of positions open, and compiled code takes only one number")
    if any(True for _ in module.buffers()):
        raise Unsupported("it keeps statistics of its batches, which compiled code would not update")
    inputs = [x, *(parameter.detach() for parameter in module.parameters())]
    with tempfile.TemporaryDirectory() as folder:
        try:
            forward, backward, kept = halved(module, x)
            with torch.no_grad():
                outputs: Sequence[Tensor] = forward(*inputs)
                given = [inputs[-1 - k] if k < 0 else outputs[1 + k] for k in kept]
                halves = [
                    _compile(half, arguments, Path(folder) / name)
                    for name, half, arguments in (
                        ("forward.pt2", forward, inputs),
                        ("backward.pt2", backward, [*given, torch.ones_like(outputs[0])]),
                    )
                ]
        except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
            raise Unsupported(f"torch does not compile it: {str(error).splitlines()[0][:160]}") from error
    layout = Form(
        rows=ROWS_TAKEN,
        entering=Place.of(x),
        parameters=tuple((name, Place.of(parameter)) for name, parameter in module.named_parameters()),
        kept=tuple(kept),
        forward_bytes=len(halves[0]),
        backward_bytes=len(halves[1]),
    )
    return pack(layout, *halves)


def halved(module: KernelModule, x: Tensor) -> tuple[fx.GraphModule, fx.GraphModule, list[int]]:
    """Forward and backward pass for any number of rows, and where what the second is given comes from, as ``Layout.kept``.

    The first maps (batch, parameters) to the output and what is kept, the second what is kept and the output's gradient to the
    gradients of batch and parameters.

    Raises:
        RuntimeError: torch does not trace it so.
    """
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    both = joint(module, x, any_rows=True)
    forward, backward = min_cut_rematerialization_partition(both, None, num_fwd_outputs=1)
    kept = _spare_inputs(forward)
    _read_rows(backward)
    return forward, backward, kept


def _spare_inputs(forward: fx.GraphModule) -> list[int]:
    """Have the forward half no longer give back what it was given, nor its number of rows.

    Returns:
        Where each kept tensor comes from, as ``Layout.kept``.
    """
    placeholders = [node for node in forward.graph.nodes if node.op == "placeholder"]
    output = next(node for node in forward.graph.nodes if node.op == "output")
    leaving, *kept = output.args[0]
    sources: list[int] = []
    values: list[Any] = []
    for value in filter(_is_tensor, kept):
        if value in placeholders:
            sources.append(-1 - placeholders.index(value))
        else:
            sources.append(len(values))
            values.append(value)
    output.args = ((leaving, *values),)
    forward.graph.lint()
    forward.recompile()
    return sources


def _read_rows(backward: fx.GraphModule) -> None:
    """Have the backward half read the number of rows off the gradient it is given, instead of being told it or a multiple.

    Raises:
        RuntimeError: it wants another number than that.
    """
    placeholders = [node for node in backward.graph.nodes if node.op == "placeholder"]
    gradient = placeholders[-1]
    for told in placeholders:
        if _is_tensor(told):
            continue
        with backward.graph.inserting_after(gradient):
            rows = backward.graph.call_function(torch.ops.aten.sym_size.int, (gradient, 0))
        with backward.graph.inserting_after(rows):
            read = backward.graph.call_function(operator.mul, (rows, _multiple(told.meta["val"])))
        told.replace_all_uses_with(read)
        backward.graph.erase_node(told)
    backward.graph.lint()
    backward.recompile()


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], Tensor)


def _compile(half: fx.GraphModule, arguments: Sequence[Tensor], path: Path) -> bytes:
    from torch._inductor import aoti_compile_and_package, config

    config.compile_threads = 1
    program = torch.export.export(half, tuple(arguments), dynamic_shapes=_sizes(half))
    aoti_compile_and_package(program, package_path=str(path))
    return path.read_bytes()


def _sizes(half: fx.GraphModule) -> tuple[dict[int, Any], ...]:
    """Which sizes of which input follow the number of rows, and how, in ``torch.export``'s terms.

    Raises:
        RuntimeError: some size is no multiple of it.
    """
    rows = Dim("rows", min=ROWS_TAKEN[0], max=ROWS_TAKEN[1])

    def size(number: torch.SymInt) -> Any:
        multiple = _multiple(number)
        return rows if multiple == 1 else multiple * rows

    return tuple(
        {place: size(number) for place, number in enumerate(node.meta["val"].shape) if isinstance(number, torch.SymInt)}
        for node in half.graph.nodes
        if node.op == "placeholder"
    )


def _multiple(number: torch.SymInt) -> int:
    """Which multiple of the number of rows, the one symbol there is, ``number`` is.

    Raises:
        RuntimeError: none.
    """
    factor, symbol = number.node.expr.as_coeff_Mul()
    if not (symbol.is_symbol and factor.is_integer):
        raise RuntimeError(f"a size of {number} does not follow the rows")
    return int(factor)


def _judged(blob: bytes, module: KernelModule, rows: int, seconds: float) -> NativeFigures:
    began = time.perf_counter()
    native = Native(blob)
    loaded = time.perf_counter()
    draw = torch.Generator().manual_seed(1)
    x = torch.randn((rows, *native.layout.entering.shape[1:]), generator=draw).requires_grad_()
    inputs = [x, *module.parameters()]
    _step(native.run(inputs, Passes()), inputs)
    first = time.perf_counter()
    difference = max(parity(native, module, size) for size in (*PARITY_ROWS, rows))
    right = difference <= PARITY_LIMIT
    forward, step = _ratios(native, module, inputs) if right else (0.0, 0.0)
    pays = step < PAYS
    reason = "" if right and pays else f"a step takes {step:.2f} of an eager one" if right else "it differs from eager"
    return NativeFigures(
        rows=rows,
        build_seconds=seconds,
        load_seconds=loaded - began,
        first_call_seconds=first - loaded,
        forward_ratio=forward,
        step_ratio=step,
        repetitions=ROUNDS if right else 0,
        parity=min(difference, 1e30) if difference == difference else 1e30,
        shipped=right and pays,
        reason=reason,
    )


def _ratios(native: Native, module: KernelModule, inputs: Sequence[Tensor]) -> tuple[float, float]:
    """Median over rounds of native over eager seconds: forward, and forward with backward, each through the module as it runs
    in a host: what checking costs counts."""

    def timed(work: Callable[[], object], times: int) -> float:
        # This thread's time: while a limit on processor time is armed, the process's own clock moves by whole ticks only.
        began = time.thread_time()
        for _ in range(times):
            work()
        return time.thread_time() - began

    x = inputs[0]
    quick = copy.deepcopy(module)
    native.attach(quick, Passes())
    given = [x, *quick.parameters()]
    pairs: tuple[tuple[Callable[[], Any], Callable[[], Any]], ...] = (
        (torch.no_grad()(lambda: quick(x)), torch.no_grad()(lambda: module(x))),
        (lambda: _step(quick(x), given), lambda: _step(module(x), inputs)),
    )
    found = []
    for ours, eager in pairs:
        timed(ours, 3)
        times = max(1, round(BLOCK_SECONDS / max(timed(eager, 3) / 3, SHORTEST_SECONDS)))
        rounds = []
        for number in range(ROUNDS):
            order = (ours, eager) if number % 2 else (eager, ours)
            taken = {work: timed(work, times) for work in order}
            rounds.append(taken[ours] / max(taken[eager], 1e-9))
        found.append(statistics.median(rounds))
    return found[0], found[1]


def _step(y: Tensor, inputs: Sequence[Tensor]) -> None:
    torch.autograd.grad(y, list(inputs), torch.ones_like(y))


if __name__ == "__main__":
    # Or the first use of the compiler spends seconds finding out by trial what the processor's flags say already.
    os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"
    torch.set_num_threads(1)
    serve({"native": compile_native})
