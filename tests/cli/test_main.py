"""The frame of `fedzo`: exit codes, error lines, options of every command, help."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from fedzo.cli import app as app_module
from fedzo.cli.command import command, group, help_text
from fedzo.cli.main import main
from fedzo.cli.output import Output
from fedzo.protocol import errors

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Replaces the app by one whose command ``act`` raises."""

    def install(error: BaseException) -> None:
        app = typer.Typer()
        app.callback()(lambda: None)

        @command(app)
        def act(output: Output, times: Annotated[int, typer.Option(help="How often.")] = 1) -> None:
            raise error

        monkeypatch.setattr(app_module, "app", app)

    return install


def error_classes() -> list[type[errors.FedzoError]]:
    return [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("cls", error_classes(), ids=lambda cls: cls.__name__)
def test_every_error_of_ours_has_its_exit_code(cls: type[errors.FedzoError], run: Run, raising: Any) -> None:
    raising(cls("it is 5, the limit is 4", hint="take 4"))
    assert run("act") == (cls.exit_code, "", "error: it is 5, the limit is 4\nhint: take 4\n")
    code, stdout, stderr = run("act", "--json")
    assert (code, stderr) == (cls.exit_code, "error: it is 5, the limit is 4\nhint: take 4\n")
    want = {"kind": cls.__name__, "message": "it is 5, the limit is 4", "hint": "take 4", "exit_code": cls.exit_code}
    assert json.loads(stdout) == {"error": want}


def test_other_errors_are_one_line_until_asked(run: Run, raising: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(ZeroDivisionError("division by zero"))
    line = "error: unexpected ZeroDivisionError: division by zero\n"
    assert run("act") == (1, "", line + "hint: --debug shows the traceback\n")
    code, _, stderr = run("act", "--debug")
    assert code == 1
    assert stderr.startswith("Traceback")
    assert stderr.endswith(line)
    monkeypatch.setenv("FEDZO_DEBUG", "1")
    assert "Traceback" in run("act")[2]
    monkeypatch.setenv("FEDZO_DEBUG", "0")
    assert "Traceback" not in run("act")[2]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()], ids=repr)
def test_an_interrupt_ends_with_130(run: Run, raising: Any, error: BaseException) -> None:
    raising(error)
    assert run("act") == (130, "", "error: interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["profils"], "no such command 'profils'. Did you mean 'profiles', 'profile'?", "fedzo --help"),
        (["--jsn"], "no such option: --jsn (Possible options: --json)", "fedzo --help"),
        (["profiles", "shwo", "x"], "no such command 'shwo'. Did you mean 'show'?", "fedzo profiles --help"),
        (["profiles", "show"], "missing argument 'NAME'.", "fedzo profiles show --help"),
    ],
)
def test_wrong_usage_ends_with_2_and_a_way_on(run: Run, arguments: list[str], message: str, hint: str) -> None:
    assert run(*arguments) == (2, "", f"error: {message}\nhint: {hint}\n")
    code, stdout, _ = run(*arguments, "--json")
    assert code == 2
    assert json.loads(stdout)["error"]["message"] == message


def test_after_two_dashes_nothing_is_an_option(run: Run, raising: Any) -> None:
    raising(errors.FedzoError("no"))
    code, stdout, _ = run("act", "--", "--json")
    assert (code, stdout) == (2, "")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["profiles"], ["profiles", "-h"]], ids=" ".join)
def test_help_goes_to_stdout(run: Run, arguments: list[str]) -> None:
    code, stdout, stderr = run(*arguments)
    assert (code, stderr) == (0, "")
    assert "Usage: fedzo" in stdout


def test_json_without_a_command_is_wrong_usage(run: Run) -> None:
    code, stdout, stderr = run("--json", "profiles")
    assert code == 2
    assert json.loads(stdout)["error"]["message"] == "fedzo profiles needs a command"
    assert stderr == "error: fedzo profiles needs a command\nhint: fedzo profiles --help\n"


def test_version_names_what_decides_the_numbers(run: Run) -> None:
    code, stdout, _ = run("--version")
    assert code == 0
    names = [line.split()[0] for line in stdout.splitlines()]
    assert names == ["fedzo", "numpy", "onnxruntime", "paho-mqtt", "torch", "onnx", "python"]
    code, stdout, _ = run("--version", "--json")
    versions = json.loads(stdout)["versions"]
    assert list(versions) == names
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_server_part(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    assert main(["--help"]) == 3
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert [line.split(":")[0] for line in stderr.splitlines()] == ["error", "hint"]
    assert "pip install 'fedzo[server]'" in stderr


def test_as_a_module_and_as_a_program() -> None:
    def lines(*program: str) -> str:
        return subprocess.run([*program, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout

    assert lines(sys.executable, "-m", "fedzo.cli") == lines(str(Path(sys.executable).parent / "fedzo"))


def test_a_reader_that_leaves_early_is_no_error() -> None:
    script = f"{sys.executable} -m fedzo.cli --help | head -c 1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


def test_ctrl_c_in_a_running_command() -> None:
    script = """
import signal, sys, time, typer
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored
from fedzo.cli import app as app_module, main
from fedzo.cli.command import command
app_module.app = typer.Typer()
app_module.app.callback()(lambda: None)
@command(app_module.app)
def wait(output):
    output.say("ready")
    time.sleep(60)
sys.exit(main.main(["wait"]))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    # rich prints its buffer once more when the signal comes between its write and its clearing of the buffer.
    assert (process.returncode, stderr.removeprefix("ready\n")) == (130, "error: interrupted\n")


def test_completion_offers_commands() -> None:
    environment = {**os.environ, "_FEDZO_COMPLETE": "complete_bash", "COMP_WORDS": "fedzo prof", "COMP_CWORD": "1"}
    program = str(Path(sys.executable).parent / "fedzo")
    done = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=60)
    assert "profiles" in done.stdout.split()


def commands(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, node
    for name, child in getattr(node, "commands", {}).items():
        yield from commands(child, f"{path} {name}")


COMMANDS = dict(commands(typer.main.get_command(app_module.app), "fedzo"))


@pytest.mark.parametrize("path", COMMANDS)
def test_every_help_teaches_with_an_example(path: str) -> None:
    text = COMMANDS[path].help
    examples = [line for line in text.splitlines() if line.startswith("$ ")]
    assert examples, f"{path} has no example"
    for line in examples:
        words = line.split()
        assert words[1] in ("fedzo", "fedzo-device"), line
    if path != "fedzo":
        assert any(line.startswith(f"$ {path}") for line in examples), f"no example of {path} itself"


@pytest.mark.parametrize("path", [path for path, node in COMMANDS.items() if not hasattr(node, "commands")])
def test_every_command_has_the_common_options(path: str) -> None:
    options = {option for parameter in COMMANDS[path].params for option in parameter.opts}
    assert {"--json", "--debug"} <= options


@pytest.mark.parametrize("path", COMMANDS)
def test_every_option_is_explained(path: str) -> None:
    for parameter in COMMANDS[path].params:
        assert parameter.help, f"{path} {parameter.name}"


def test_help_text_keeps_examples_and_joins_paragraphs() -> None:
    text = help_text(
        """Do a thing
        over two lines with fedzo[server].

        Example:
            $ fedzo one
            $ fedzo two
        """
    )
    assert text == "Do a thing over two lines with fedzo\\[server].\n\nExample:\n$ fedzo one\n$ fedzo two"


def test_a_command_gets_its_output_and_its_arguments(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    app.callback()(lambda: None)
    boards = group(app, "boards", "Boards.\n\nExample:\n    $ fedzo boards add x")

    @command(boards, "add")
    def add_board(
        output: Output,
        name: Annotated[str, typer.Argument(help="Its name.")],
        cores: Annotated[int, typer.Option(help="Cores [1 to 4].")] = 1,
    ) -> None:
        output.say(f"adding {name}")
        output.result({"name": name, "cores": cores})

    monkeypatch.setattr(app_module, "app", app)
    assert run("boards", "add", "zero", "--cores", "4", "--json") == (
        0,
        '{"name": "zero", "cores": 4}\n',
        "adding zero\n",
    )
    assert run("boards", "add", "zero") == (0, "", "adding zero\n")
    assert "Cores [1 to 4]." in run("boards", "add", "--help")[1]
