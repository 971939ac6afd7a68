"""As whom to connect: by a principal's own key on the platform's server, by user and password on an external one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from esper_core.bus.nkey import Nkey
from esper_core.bus.policy import inbox
from esper_core.config import Endpoints
from esper_core.errors import NotFound


@dataclass(frozen=True)
class Login:
    """What a client proves itself with; nothing of it is secret to look at.

    Attributes:
        principal, key: who this is, and the key that shows it.
        user, password: for a server that knows no keys; all None where it asks for nothing.
    """

    principal: str | None = None
    key: Nkey | None = None
    user: str | None = None
    password: SecretStr | None = None

    @property
    def options(self) -> dict[str, Any]:
        """As nats-py's ``connect`` wants it."""
        if self.key is None:
            return {"user": self.user, "password": self.password.get_secret_value() if self.password else None}
        return {"signature_cb": self.key.sign, "inbox_prefix": inbox(self.principal or "")}

    def __str__(self) -> str:
        if self.key is None:
            return f"user {self.user!r} or the password"
        return f"the key of {self.principal} ({self.key.public})"

    @property
    def hint(self) -> str:
        """What to do when the server does not take it."""
        if self.key is None:
            return "check the credentials of the external server, ESPER_NATS__USER and ESPER_NATS__PASSWORD"
        return "the server reads the keys when it starts: `esperctl down`, then `esperctl up`; or ESPER_DATA_DIR is another's"


def seed_file(keys_dir: Path, principal: str) -> Path:
    """Where the seed of ``principal`` lies; whoever reads it is that principal."""
    return keys_dir / f"{principal}.nk"


def login_of(endpoints: Endpoints, principal: str) -> Login:
    """The login of ``principal`` on the platform's bus.

    Raises:
        NotFound: there is no key for it under the data directory, or this user may not read it.
        Corrupt: its key was altered.
    """
    if endpoints.nats_keys_dir is None:
        return Login(user=endpoints.nats_user, password=endpoints.nats_password)
    path = seed_file(endpoints.nats_keys_dir, principal)
    try:
        seed = path.read_text("ascii")
    except OSError as error:
        raise NotFound(
            f"the event bus's key of {principal!r} cannot be read: {path}: {error.strerror}",
            hint="`esperctl up` makes one for everybody with business on the bus; use the account that ran it",
        ) from None
    return Login(principal, Nkey.read(seed))
