"""`python -m tests.bench`: measure, show the tables, and write them down.

Progress goes to standard error, tables to standard output. Exit code 1 when a bench could not be run; figures never
fail it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from tests.bench import report
from tests.bench.bench import Bench, Outcome, Pace
from tests.bench.device import CPU, CUDA, described, missing
from tests.bench.ground import Ground
from tests.bench.machine import load, machine
from tests.bench.registry import ABOUT, ANY_DEVICE, GROUPS, USUAL, bench, expanded


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.splitlines()[0])
    made.add_argument(
        "names", nargs="*", metavar="NAME", help=f"which: {', '.join((*ABOUT, *GROUPS))} (default: {', '.join(USUAL)})"
    )
    made.add_argument("--list", action="store_true", help="say what there is to measure")
    made.add_argument("--quick", action="store_true", help="a glance: fewer rounds, hosts and seeds")
    made.add_argument("--seeds", type=int, default=8, metavar="N", help="seeds of the demo (default: 8)")
    made.add_argument("--platform", action="store_true", help="seeds: also through the platform, service by service")
    made.add_argument("--device", choices=(CPU, CUDA), default=CPU, help="where hosts live (default: cpu)")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write every figure there")
    made.add_argument(
        "--report", action="store_true", help=f"also write {report.PATH.name}, other benches' sections kept"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the wished benches; the exit code."""
    options = parser().parse_args(arguments)
    if options.list:
        for name, about in ABOUT.items():
            print(f"{name:<10}{about}")
        for name, members in GROUPS.items():
            print(f"{name:<10}= {' '.join(members)}")
        return 0
    wanted = expanded(options.names or USUAL)
    if refusal := _refusal(options, wanted):
        print(refusal, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwind: the servers outlive whoever starts them
    facts = {**machine(), "device": described(options.device), "mode": "quick" if options.quick else "full"}
    out = Console() if sys.stdout.isatty() else Console(width=170)
    report.show_machine(out, facts)
    outcomes = []
    with Ground() as ground:
        pace = Pace(options.quick, options.seeds, options.platform, ground, options.device)
        for name in wanted:
            outcomes.append(_run(bench(name), pace))
            report.show(out, outcomes[-1])
    facts["load"] = f"{facts['load']} before and {load()} after"
    if options.json:
        options.json.write_text(json.dumps(report.plain(facts, outcomes), indent=1) + "\n", encoding="utf-8")
    if options.report:
        report.write(facts, outcomes)
    return 1 if any(outcome.failed for outcome in outcomes) else 0


def _refusal(options: argparse.Namespace, wanted: Sequence[str]) -> str:
    """Why this cannot be measured; empty when it can."""
    if unknown := [name for name in wanted if name not in ABOUT]:
        return f"error: no bench {unknown[0]!r}\nhint: {', '.join((*ABOUT, *GROUPS))}"
    if options.seeds < 1:
        return f"error: --seeds {options.seeds} trains nothing\nhint: 1 or more"
    if why := missing(options.device):
        return f"error: {why}\nhint: --device cpu, or a torch with CUDA on a machine that has one"
    if options.device != CPU and (bound := [name for name in wanted if name not in ANY_DEVICE]):
        return f"error: bench {bound[0]!r} has nothing to do with a {options.device} device\nhint: exec has"
    return ""


def _run(wanted: Bench, pace: Pace) -> Outcome:
    """Run one bench; what goes wrong in it is said and does not keep the others from running."""
    print(f"{wanted.name}: {wanted.about}", file=sys.stderr, flush=True)
    began = time.perf_counter()
    outcome = Outcome(wanted, 0.0)
    try:
        with _one_thread():
            outcome.tables = wanted.run(pace)
    except Exception as error:  # noqa: BLE001 - a bench may fail in any way; the others are still worth having
        traceback.print_exc()
        outcome.failed = f"{type(error).__name__}: {error}"
    outcome.seconds = time.perf_counter() - began
    return outcome


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Tensor work on one thread, unless a bench says otherwise."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    sys.exit(main())
