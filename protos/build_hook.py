"""Lets ``pip install .`` and ``python -m build`` make the stubs, so that a wheel comes out of a clean checkout."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StubsHook(BuildHookInterface[Any]):
    """Runs ``protos/generate.py`` before files are collected."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        sys.path.insert(0, str(Path(self.root) / "protos"))
        importlib.import_module("generate").generate()
