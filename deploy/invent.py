"""The innovation plane at work: train, let Karn invent for the slot that grew, train again with what it invented.

Usage: invent.py ESPERCTL [--preset digits-narrow] [--repeat 3] [--generations 20] [--population 4]. What a person reads goes to standard
error; standard output gets one JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

FIGURES = ("grown_accuracy", "gain_mean", "gain_interval_95", "added_parameters", "report")
"""What is told of a training."""


def main() -> int:
    """Run the demonstration; 0 when a kernel of Karn's became part of a network."""
    options = _options().parse_args()
    esperctl = Esperctl(options.esperctl)
    esperctl.show("up")
    training = ("train", options.preset, "--repeat", str(options.repeat))
    before = esperctl.ask(*training)
    grown = esperctl.ask("seed", "list", "--run", before["run"], "--state", "fossilized")[0]
    # The slot as it was: the network that grew offers another one there now.
    slot = esperctl.ask("kernel", "show", grown["kernel_id"])["interface_id"]
    say(f"\nIt grew at {grown['slot']}. Karn designs kernels for such a slot; Tezzeret builds, Urabrask measures each:")
    size = ("-g", str(options.generations), "-p", str(options.population), "--seed", str(options.seed))
    esperctl.show("karn", "run", "--interface", slot, *size)
    esperctl.show("karn", "archive", "--interface", slot)
    search = esperctl.ask("karn", "searches")[0]
    say("\nThe same training once more; the controller now chooses among what Karn invented as well:")
    after = esperctl.ask(*training)
    found = esperctl.ask("kernel", "query", "--born-of", "karn", "--by", "interest", "--limit", "1000")["kernels"]
    born = {kernel["manifest"]["kernel_id"] for kernel in found}
    runs = [seed["run"] for seed in after["seeds"]]
    kept = [seed for run in runs for seed in esperctl.ask("seed", "list", "--run", run, "--state", "fossilized")]
    fossils = [seed["blueprint_name"] for seed in kept if seed["kernel_id"] in born]
    told = {
        "karn_born_fossilized": len(fossils),
        "designs": sorted(set(fossils)),
        "kernels_of_karn": len(born),
        "generations": search["generation"],
        "proposed": search["proposed"],
        "unfit": search["unfit"],
        **{name: search["progress"][0][name] for name in ("best", "coverage")},
        "before": {name: before[name] for name in FIGURES},
        "after": {name: after[name] for name in FIGURES},
    }
    sys.stdout.write(json.dumps(told) + "\n")
    return 0 if fossils else 1


class Esperctl:
    """The command line as a newcomer types it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def show(self, *words: str) -> None:
        """For a person: what it says goes to standard error."""
        subprocess.run([self.path, *words], stdout=sys.stderr, check=True)

    def ask(self, *words: str) -> Any:
        """For this program."""
        done = subprocess.run([self.path, *words, "-o", "json"], stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout)


def say(text: str) -> None:
    """Tell the person."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("esperctl", help="path of esperctl")
    parser.add_argument("--preset", default="digits-narrow", help="what is trained")
    parser.add_argument("--repeat", type=int, default=3, help="seeds of each training")
    parser.add_argument("--generations", type=int, default=20)
    parser.add_argument("--population", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1, help="of Karn's chance; 0 draws one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
