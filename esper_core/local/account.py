"""Whom to be, and where: PostgreSQL refuses to run as root, so under root it runs as an account without privileges.

That account must be able to reach its data and its program. Where a directory above stops it (a data directory under
``/root``, a virtual environment in a private home), the part it needs lives under ``/var/lib/esper`` instead and the
data directory holds a link to it. Permission bits are what is looked at; access control lists are not.
"""

from __future__ import annotations

import hashlib
import os
import pwd
from dataclasses import dataclass
from pathlib import Path

from esper_core.errors import InvalidInput, Unsupported

_CANDIDATES = ("esper", "postgres", "nobody")
_ELSEWHERE = Path("/var/lib/esper")


@dataclass(frozen=True)
class Account:
    """An unprivileged system account."""

    name: str
    uid: int
    gid: int


def account_for(data: Path) -> Account | None:
    """Who should run the server that keeps ``data``: the owner of what is there, else the first candidate there is.

    Returns:
        ``None`` when this process is not root: then it runs as this user.

    Raises:
        Unsupported: root, and the machine has none of the candidates.
    """
    if os.geteuid() != 0:
        return None
    try:
        owner = data.stat().st_uid
        if owner != 0:
            entry = pwd.getpwuid(owner)
            return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
    except (FileNotFoundError, KeyError):
        pass  # nothing there yet, or its owner is gone from this machine: choose
    for name in _CANDIDATES:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(name, entry.pw_uid, entry.pw_gid)
    raise Unsupported(
        f"PostgreSQL may not run as root, and there is none of the accounts {', '.join(_CANDIDATES)}",
        hint="add one: useradd --system esper",
    )


def reaches(account: Account | None, folder: Path) -> bool:
    """Whether ``account`` may pass through every directory down to ``folder``, links followed."""
    if account is None:
        return True
    real = folder.resolve()
    return all(_passes(account, part.stat()) for part in (real, *real.parents))


def _passes(account: Account, info: os.stat_result) -> bool:
    if info.st_uid == account.uid:
        return bool(info.st_mode & 0o100)
    if info.st_gid == account.gid:
        return bool(info.st_mode & 0o010)
    return bool(info.st_mode & 0o001)


def home(account: Account | None, wanted: Path) -> Path:
    """Make and return ``account``'s own directory: ``wanted``, or a link there to one that it can reach.

    Raises:
        InvalidInput: neither place can be used.
    """
    if not wanted.is_symlink() and not wanted.exists() and not reaches(account, wanted.parent):
        name = hashlib.sha256(os.fsencode(wanted)).hexdigest()[:16]
        _make(_ELSEWHERE, None, 0o711)
        wanted.symlink_to(_ELSEWHERE / name)
    real = wanted.resolve()
    _make(real, account, 0o700)
    if account is not None and not reaches(account, real):
        raise InvalidInput(
            f"{account.name} cannot reach {real}",
            hint="a directory above it lost its permissions: restore them, or choose another ESPER_DATA_DIR",
        )
    return real


def _make(folder: Path, account: Account | None, mode: int) -> None:
    try:
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
        folder.chmod(mode)
        if account is not None:
            os.chown(folder, account.uid, account.gid)
    except OSError as error:
        raise InvalidInput(
            f"{folder} cannot be made: {error.strerror}",
            hint="choose a data directory that other accounts can pass through, e.g. ESPER_DATA_DIR=/srv/esper",
        ) from error
