"""The edge: errors become one line, a hint and an exit code; options may stand before or after the command."""

import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from esper_core import errors
from esper_core.cli import app as application
from esper_core.cli.command import Invocation, command

CONCRETE = [cls for cls in errors.every() if cls is not errors.EsperError]


def run_with(body, *arguments: str):
    """The result of a command that does ``body``, under esperctl's own global options."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(application.root)
    command(app, "do")(body)
    return CliRunner().invoke(app, list(arguments))


def raiser(error: BaseException):
    def body(call: Invocation) -> None:
        raise error

    return body


@pytest.mark.parametrize("cls", CONCRETE, ids=lambda cls: cls.__name__)
def test_an_error_is_a_line_a_hint_and_its_exit_code(cls):
    done = run_with(raiser(cls("it is\nbroken", hint="mend it")), "do")
    assert done.exit_code == cls.exit_code
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["error: it is broken", "hint: mend it"]


def test_no_hint_no_line():
    assert run_with(raiser(errors.Conflict("not now")), "do").stderr.splitlines() == ["error: not now"]


def test_the_unexpected_is_told_without_a_traceback():
    done = run_with(raiser(ZeroDivisionError("by nought")), "do")
    assert done.exit_code == 70
    assert done.stderr.splitlines()[0] == "error: ZeroDivisionError: by nought"
    assert "--debug" in done.stderr.splitlines()[1]


@pytest.mark.parametrize("error", [ZeroDivisionError("by nought"), errors.NotFound("nothing")])
def test_debug_lets_it_through(error):
    assert run_with(raiser(error), "--debug", "do").exception is error


def test_ctrl_c():
    assert run_with(raiser(KeyboardInterrupt()), "do").exit_code == 130


def test_long_messages_stay_on_one_line():
    assert run_with(raiser(errors.NotFound("x " * 400)), "do").stderr.count("\n") == 1


def test_control_characters_of_a_message_do_not_reach_the_terminal():
    assert "\x1b" not in run_with(raiser(errors.NotFound("\x1b[31mred\x07")), "do").stderr


@pytest.mark.parametrize("arguments", [["do", "-o", "json"], ["-o", "json", "do"], ["-o", "table", "do", "-o", "json"]])
def test_the_output_option_stands_anywhere(arguments):
    async def body(call: Invocation) -> None:
        call.output.document({"a": 1}, "for people")

    assert json.loads(run_with(body, *arguments).stdout) == {"a": 1}


def test_tables_are_the_default_and_notes_go_to_stderr():
    def body(call: Invocation) -> None:
        call.output.document({"a": 1}, "for people")
        call.output.note("by the way")

    done = run_with(body, "do")
    assert (done.stdout, done.stderr) == ("for people\n", "by the way\n")


def test_the_data_directory_comes_from_option_then_environment(tmp_path, monkeypatch):
    def body(call: Invocation) -> None:
        call.output.document(str(call.data_dir))

    monkeypatch.setenv("ESPER_DATA_DIR", str(tmp_path / "env"))
    for arguments, wanted in (
        (["do"], "env"),
        (["--data-dir", str(tmp_path / "before"), "do"], "before"),
        (["--data-dir", "nowhere", "do", "--data-dir", str(tmp_path / "after")], "after"),
    ):
        assert json.loads(run_with(body, *arguments, "-o", "json").stdout) == str(tmp_path / wanted)


def test_without_a_platform_the_hint_says_how_to_start_one(esperctl, tmp_path):
    for arguments in (["runs", "list"], ["seed", "show"], ["kernel", "list", "-o", "json"], ["bus", "tail"]):
        done = esperctl(*arguments, "--data-dir", str(tmp_path))
        assert done.exit_code == 3
        assert done.stdout == ""
        assert "esperctl up" in done.stderr


def test_a_mistyped_command_is_answered_with_the_nearest(esperctl):
    done = esperctl("kernel", "lst")
    assert done.exit_code == 2
    assert "list" in done.stderr


def test_a_reader_that_leaves_is_no_traceback():
    script = """
import sys
from esper_core.cli.command import Invocation, command
import typer
app = typer.Typer(pretty_exceptions_enable=False)
app.callback()(lambda: None)
@command(app, "do")
def body(call: Invocation) -> None:
    for number in range(100000):
        call.output.line(number, "")
app(["do", "-o", "json"])
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"0\n"
    child.stdout.close()
    assert child.stderr is not None
    words = child.stderr.read()
    child.stderr.close()
    assert child.wait(30) == 141
    assert words == b""
