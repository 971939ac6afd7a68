"""The data directory: where each thing lives, and how private files are written.

    supervisor.lock  held by the one supervisor        endpoints.json  where clients find everything
    state.json       what runs, for `status`           secrets/        generated passwords, ports, the CA's key
    tls/ keys/       certificates; signing keys        logs/           one file per child
    nkeys/           the event bus's keys
    nats/ s3/        the servers' data                 postgres/       same; a link when it has to live elsewhere

Everything is mode 0700/0600. Under root the data directory itself is 0711, so that the unprivileged account that
PostgreSQL insists on can pass through to its own part; it can list and read nothing.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from esper_core.config import ENDPOINTS_FILE
from esper_core.errors import Forbidden, InvalidInput


@dataclass(frozen=True)
class Layout:
    """Paths under one data directory."""

    root: Path

    @property
    def lock(self) -> Path:
        return self.root / "supervisor.lock"

    @property
    def state(self) -> Path:
        return self.root / "state.json"

    @property
    def endpoints(self) -> Path:
        return self.root / ENDPOINTS_FILE

    @property
    def secrets(self) -> Path:
        return self.root / "secrets"

    @property
    def tls(self) -> Path:
        return self.root / "tls"

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    @property
    def nkeys(self) -> Path:
        return self.root / "nkeys"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def nats(self) -> Path:
        return self.root / "nats"

    @property
    def s3(self) -> Path:
        return self.root / "s3"

    @property
    def postgres(self) -> Path:
        return self.root / "postgres"

    def create(self) -> None:
        """Make the directories, private to this user.

        Raises:
            InvalidInput: the place cannot be written.
            Forbidden: it is another user's; what two accounts write, neither can use.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            owner = self.root.stat().st_uid
            if owner != os.geteuid():
                raise Forbidden(
                    f"the data directory {self.root} belongs to user {owner}, this is user {os.geteuid()}",
                    hint="use the account that made it, or choose another with ESPER_DATA_DIR",
                )
            self.root.chmod(0o711 if os.geteuid() == 0 else 0o700)
            for part in (self.secrets, self.tls, self.keys, self.nkeys, self.logs, self.nats, self.s3):
                part.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise InvalidInput(
                f"the data directory {self.root} cannot be used: {error.strerror}",
                hint="choose another with ESPER_DATA_DIR",
            ) from error


def write_private(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Put ``data`` at ``path`` in one step, readable by this user alone; a reader sees the old or the new, never half.

    ``durable``: also survive a loss of power.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
