"""What a kernel is built for and with: part of a build's name, so that a library moved to another kind of machine, or a
forge with another torch, builds anew instead of trusting what was built and measured elsewhere. Free of torch.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

from services.sandbox import target

COMPILER = "esper-forge/2"
PARTS = ("torch", "safetensors")
MAX_CHARACTERS = 200


@dataclass(frozen=True)
class Toolchain:
    """A kind of machine and the programs a forge uses on it.

    Attributes:
        target: fingerprint of the machine kind, at most 120 characters.
        versions: by name: python, torch, safetensors.
    """

    target: str
    versions: Mapping[str, str]

    @property
    def name(self) -> str:
        """One line that two equal toolchains share: ``esper-forge/2 python/3.11.7 …``."""
        parts = (f"{name}/{self.versions[name]}" for name in sorted(self.versions))
        return " ".join((COMPILER, *parts))[:MAX_CHARACTERS]


@cache
def here() -> Toolchain:
    """That of this process's machine and environment."""
    return Toolchain(target(), {"python": platform.python_version(), **{name: version(name) for name in PARTS}})
