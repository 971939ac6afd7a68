"""`esperctl` as people run it: a process of its own, on a platform of its own that it brought up itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper_core.local.services import import_path

_SCRIPT = "import sys; sys.argv[0] = 'esperctl'; from esper_core.cli.app import main; main()"


def run_esperctl(data_dir: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run it with ``variables`` as ESPER_… variables; nothing of the caller's own ESPER_… variables is seen."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ESPER_")}
    environment = {**kept, "PYTHONPATH": import_path(), "ESPER_DATA_DIR": str(data_dir), **variables}
    return subprocess.run(
        [sys.executable, "-c", _SCRIPT, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )


@pytest.fixture(scope="module")
def data_dir() -> Iterator[Path]:
    """A module's data directory, empty at first; its platform is stopped afterwards, whatever happened."""
    folder = Path(tempfile.mkdtemp(prefix="esper-cli-"))  # not pytest's own: closed to the account of PostgreSQL
    try:
        yield folder
    finally:
        run_esperctl(folder, "down")
        shutil.rmtree(folder)
