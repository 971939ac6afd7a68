"""Up, status and down on real servers, and what goes wrong with them."""

import json
import os
import re
import signal
import socket

import psutil
import pytest

from tests.service.cli.conftest import run_esperctl

SERVERS = {"ESPER_SERVICES_COMMAND": "[]"}
NAMES = ["nats", "postgres", "s3"]


@pytest.fixture
def came(data_dir):
    """What `esperctl up` answers; after the first time the platform runs already."""
    done = run_esperctl(data_dir, "up", "-o", "json", **SERVERS)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stderr
    return json.loads(done.stdout)


def status(data_dir):
    return json.loads(run_esperctl(data_dir, "status", "-o", "json", **SERVERS).stdout)


def test_nothing_was_ever_started(data_dir):
    gone = run_esperctl(data_dir, "status", "-o", "json")
    assert gone.returncode == 8
    assert json.loads(gone.stdout)["running"] is False
    assert "esperctl up" in gone.stderr
    assert json.loads(run_esperctl(data_dir, "down", "-o", "json").stdout)["stopped"] is False


def test_up_tells_what_started_and_shows_nothing_secret(data_dir):
    done = run_esperctl(data_dir, "up", **SERVERS)
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        assert re.search(rf"^{name} +ready +[0-9.]+ s$", done.stderr, re.MULTILINE)
    pages = [
        done,
        *(run_esperctl(data_dir, *call, **SERVERS) for call in (["up", "-o", "json"], ["status", "-o", "json"])),
    ]
    shown = "".join(page.stdout + page.stderr for page in pages)
    kept = json.loads((data_dir / "endpoints.json").read_text())
    seeds = [seed.read_text() for seed in (data_dir / "nkeys").iterdir()]
    for secret in (*seeds, kept["s3_secret_key"], kept["s3_access_key"]):
        assert len(secret) > 8
        assert secret not in shown
    assert len(seeds) > 1


def test_up_twice_is_up_once(data_dir, came):
    again = json.loads(run_esperctl(data_dir, "up", "-o", "json", **SERVERS).stdout)
    assert [child["name"] for child in came["children"]] == NAMES
    assert [child["pid"] for child in again["children"]] == [child["pid"] for child in came["children"]]
    assert again["endpoints"] == came["endpoints"]


def test_status_of_a_healthy_platform(data_dir, came):
    page = run_esperctl(data_dir, "status", **SERVERS)
    assert page.returncode == 0, page.stderr
    told = [line.split()[:4] for line in page.stdout.splitlines() if line.split(" ")[0] in NAMES]
    assert told == [[child["name"], "ready", "yes", str(child["pid"])] for child in came["children"]]


def test_a_child_that_is_gone_is_healed_and_counted(data_dir, came):
    victim = next(child for child in came["children"] if child["name"] == "nats")
    os.kill(victim["pid"], signal.SIGKILL)
    for _ in range(60):
        child = next(child for child in status(data_dir)["children"] if child["name"] == "nats")
        if child["restarts"] > victim["restarts"] and child["healthy"]:
            break
    assert (child["restarts"], child["healthy"]) == (victim["restarts"] + 1, True)
    assert child["pid"] != victim["pid"]


def test_down_stops_all_and_may_be_repeated(data_dir, came):
    assert json.loads(run_esperctl(data_dir, "down", "-o", "json").stdout)["stopped"] is True
    assert not any(psutil.pid_exists(child["pid"]) for child in came["children"])
    assert json.loads(run_esperctl(data_dir, "down", "-o", "json").stdout)["stopped"] is False
    assert (data_dir / "endpoints.json").exists()


def test_a_taken_port_is_refused_with_a_hint(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run_esperctl(tmp_path, "up", "--nats-port", str(port), **SERVERS)
    assert done.returncode not in (0, 70)
    assert str(port) in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_options_over_variables_over_file(tmp_path):
    settings = tmp_path / "platform.yaml"
    settings.write_text("nats: {url: 'file://nonsense'}\n")
    done = run_esperctl(tmp_path, "up", "--config", str(settings))
    assert done.returncode == 2
    assert "nats.url" in done.stderr
    done = run_esperctl(tmp_path, "up", "--config", str(settings), ESPER_NATS__URL="variable")
    assert "'variable'" in done.stderr
    settings.write_text("nats: {url: 'nats://file:1'}\n")
    done = run_esperctl(tmp_path, "up", "--config", str(settings), "--nats-url", "option", ESPER_NATS__URL="nats://v:1")
    assert done.returncode == 2
    assert "'option'" in done.stderr
    settings.write_text("nats: {urll: 'nats://file:1'}\n")
    done = run_esperctl(tmp_path, "up", "--config", str(settings))
    assert done.returncode == 2
    assert "did you mean 'url'?" in done.stderr
