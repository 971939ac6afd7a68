"""Run configurations that ship with the package; each file's first line is a comment saying what it shows."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def available() -> dict[str, str]:
    """Description by name, of every preset."""
    return {file.stem: _described(file) for file in sorted(_FOLDER.glob("*.yaml"))}


def path(name: str) -> Path:
    """Where the preset ``name`` lies; it is one of ``available()``."""
    return _FOLDER / f"{name}.yaml"


def _described(file: Path) -> str:
    first, _, _ = file.read_text(encoding="utf-8").partition("\n")
    return first.removeprefix("#").strip()
