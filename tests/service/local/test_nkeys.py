"""The bus's keys in a data directory: made once, private, and made up for where an older version had one password."""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from esper_core.bus.bus import Bus
from esper_core.bus.login import Login
from esper_core.bus.policy import PRINCIPALS
from esper_core.bus.subjects import RUN_EVENTS
from esper_core.config import PlatformConfig
from esper_core.errors import Corrupt, InvalidInput
from esper_core.local import nats, stack
from esper_core.local.layout import Layout
from tests.service.bus.conftest import NatsServer

KEPT = RUN_EVENTS.of("kept")


@pytest.fixture
def config() -> Iterator[PlatformConfig]:
    folder = Path(tempfile.mkdtemp(prefix="esper-test-"))  # not pytest's: closed to the account PostgreSQL runs as
    config = PlatformConfig(data_dir=folder, services_command=())
    yield config
    stack.down(config)
    shutil.rmtree(folder)


async def _as_it_was(layout: Layout) -> str:
    """A data directory from before there were keys: one user, and an event in a stream; the password."""
    password = secrets.token_urlsafe(24)
    server = NatsServer(layout.nats)
    server.config.write_text(
        f'listen: "127.0.0.1:{server.port}"\njetstream {{ store_dir: "{layout.nats}" }}\nmax_payload: 1048576\n'
        f'authorization {{ user: "esper", password: "{password}" }}\n'
    )
    server.start()
    try:
        bus = await Bus.connect(server.url, Login(user="esper", password=SecretStr(password)), "before")
        await bus.provision()
        await bus.publish_bytes(KEPT, b"from before", message_id="1")
        await bus.close()
    finally:
        server.stop()
    kept = {name: secrets.token_urlsafe(24) for name in ("postgres_password", "s3_access_key", "s3_secret_key")}
    file = layout.secrets / "credentials.json"
    file.write_text(json.dumps({"nats_password": password, **kept}))
    file.chmod(0o600)
    return password


async def test_a_data_directory_with_one_password_upgrades_by_itself(config: PlatformConfig) -> None:
    layout = Layout(config.data_dir)
    layout.create()
    password = await _as_it_was(layout)
    before = json.loads((layout.secrets / "credentials.json").read_text())
    del before["nats_password"]

    endpoints = stack.up(config)
    assert json.loads((layout.secrets / "credentials.json").read_text()) == before
    written = [path for path in (*layout.root.glob("*"), *layout.root.glob("*/*")) if path.is_file()]
    assert layout.nats / "nats.conf" in written
    assert not [path for path in written if password.encode() in path.read_bytes()]
    bus = await Bus.join(endpoints, "tolaria")
    assert (await bus.jetstream.get_msg(RUN_EVENTS.stream.name, 1)).data == b"from before"
    assert (await bus.publish_bytes(KEPT, b"after", message_id="2")).sequence == 2
    await bus.close()


def test_keys_are_made_once_and_are_for_the_owners_eyes(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "data")
    layout.create()
    made = nats.provision(layout)
    assert set(made) == PRINCIPALS
    assert len(set(made.values())) == len(PRINCIPALS)
    assert {path.stat().st_mode & 0o777 for path in layout.nkeys.iterdir()} == {0o600}
    assert {path.stem for path in layout.nkeys.iterdir()} == PRINCIPALS
    (layout.nkeys / "karn.nk").unlink()
    again = nats.provision(layout)
    assert {name for name in made if made[name] != again[name]} == {"karn"}
    settings = nats.settings(layout, again, 4222)
    assert all(key in settings for key in again.values())
    assert not [path for path in layout.nkeys.iterdir() if path.read_text() in settings]


def test_a_damaged_key_and_a_password_for_nobody_are_refused(config: PlatformConfig) -> None:
    layout = Layout(config.data_dir)
    layout.create()
    (layout.nkeys / "nissa.nk").write_text("SUnonsense")
    with pytest.raises(Corrupt, match=r"nissa\.nk") as caught:
        stack.up(config)
    assert "delete it" in caught.value.hint
    (layout.nkeys / "nissa.nk").unlink()
    named = config.model_copy(update={"nats": config.nats.model_copy(update={"password": SecretStr("for nobody")})})
    with pytest.raises(InvalidInput, match=r"nats\.password is given"):
        stack.up(named)
