"""What starting costs, and that help is there for everyone."""

import subprocess
import sys

import pytest

from esper_core.cli.app import app

SCRIPT = """
import sys
sys.argv = ["esperctl", *sys.argv[1:]]
from esper_core.cli.app import main
try:
    main()
except SystemExit as left:
    assert left.code in (0, None), left.code
print("loaded:", *(name for name in ("torch", "grpc", "services", "numpy", "nats", "asyncpg") if name in sys.modules))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--list"], ["seed", "show", "--help"], ["--version"]])
def test_starts_without_anything_heavy(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["loaded:"]


def test_help_off_a_terminal_has_no_ansi(esperctl):
    for arguments in (["--help"], ["kernel", "--help"], ["kernel", "pull", "--help"]):
        done = esperctl(*arguments)
        assert done.exit_code == 0
        assert "\x1b" not in done.output


def commands() -> list[list[str]]:
    found = [[command.name] for command in app.registered_commands]
    for group in app.registered_groups:
        found += [
            [group.typer_instance.info.name, command.name] for command in group.typer_instance.registered_commands
        ]
    return found


@pytest.mark.parametrize("path", commands(), ids="-".join)
def test_every_command_teaches_by_example_and_takes_the_output_option(path: list[str], esperctl) -> None:
    page = " ".join(esperctl(*path, "--help").output.split())
    assert f"Example: esperctl {' '.join(path)}" in page
    assert "--output" in page
    assert "--data-dir" in page


def test_the_promised_nouns_are_there() -> None:
    names = {path[0] for path in commands()}
    assert names >= {"up", "down", "status", "train", "runs", "seed", "kernel", "blueprint", "decisions", "bus"}
    paths = {tuple(path) for path in commands()}
    for noun, verbs in {
        "seed": "list show germinate transition watch",
        "kernel": "list show pull verify load unload",
        "blueprint": "submit list show",
        "runs": "list show watch",
        "decisions": "list show",
        "bus": "tail events dead-letters",
    }.items():
        assert paths >= {(noun, verb) for verb in verbs.split()}
