"""The README's captioned tree is true: what it names exists, what exists is named, the root holds what belongs there; its code runs."""

from __future__ import annotations

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ALLOWED = {
    *("protos", "services", "esper_core", "tests", "deploy"),
    *("buf.yaml", "pyproject.toml", "Makefile", "README.md", "LICENSE"),
}
SPEAKS_FOR_ITSELF = {"README.md", "LICENSE"}
IGNORED = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split() if not line.startswith("#")]


def tree() -> dict[str, str]:
    """Path and caption of every line."""
    found = re.search(r"^## The tree\n+```\w*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert found, "the README has no ``` block under 'The tree'"
    lines = [re.fullmatch(r"(\S+) {2,}(\S.*)", line) for line in found[1].splitlines() if line.strip()]
    assert all(lines), "a line without two spaces and a caption"
    return {line[1]: line[2] for line in lines if line}


def kept(folder: Path) -> list[Path]:
    """What of a folder is in the repository."""
    return [
        path
        for path in sorted(folder.iterdir())
        if not any(
            fnmatch(path.name, pattern) or fnmatch(str(path.relative_to(ROOT)), pattern)
            for pattern in (*IGNORED, ".git")
        )
    ]


def test_everything_it_names_exists() -> None:
    named = tree()
    assert len(named) > 20
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing
    assert not [path for path in named if (ROOT / path).is_dir() != path.endswith("/")]


def test_every_package_is_named_with_a_caption() -> None:
    packages = [
        f"{path.relative_to(ROOT)}/"
        for name in ("esper_core", "services")
        for path in kept(ROOT / name)
        if path.is_dir() and any(path.rglob("*.py"))
    ]
    assert len(packages) > 10
    named = tree()
    assert not [package for package in packages if len(named.get(package, "")) < 10]


def test_the_root_holds_what_belongs_there_and_all_of_it_is_named() -> None:
    entries = {path.name for path in kept(ROOT) if not path.name.startswith(".")}
    assert entries == ALLOWED
    named = {path.strip("/") for path in tree()}
    assert entries - SPEAKS_FOR_ITSELF <= named


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:|#)([^)]+)\)", README))))
def test_its_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link.partition("#")[0]).exists()


def test_its_own_loop_runs_as_written() -> None:
    snippet = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert snippet is not None
    code = snippet[1] + "\nassert type(plain) is nn.Sequential\n"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
