"""What goes to stdout and what to stderr, and that foreign text cannot drive the terminal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedzo.cli.output import Output


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True)
class Point:
    x: int
    name: str


def test_people_read_answers_on_stdout_and_progress_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output()
    output.say("working")
    output.text("answer")
    output.table(("name", "MiB"), [("a", 1.5), ("b", None)])
    output.result({"name": "a"})
    stdout, stderr = capsys.readouterr()
    assert stdout == "answer\nname\tMiB\na\t1.5\nb\t\n"
    assert stderr == "working\n"


def test_json_is_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(json=True)
    output.say("working")
    output.text("answer")
    output.table(("name",), [("a",)], title="Names")
    with output.progress("counting", total=2) as advance:
        advance()
        advance(1, description="more")
    output.result({"name": "a"})
    stdout, stderr = capsys.readouterr()
    assert json.loads(stdout) == {"name": "a"}
    assert stdout.count("\n") == 1
    assert stderr == "working\nanswer\nNames\nname\na\ncounting\n"


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (Path("a/b"), "a/b"),
        (Colour.RED, "red"),
        (Point(1, "p"), {"x": 1, "name": "p"}),
        ((1, 2.5, None, True), [1, 2.5, None, True]),
        (float("nan"), None),
        (float("-inf"), None),
        (np.float32(0.5), 0.5),
        (np.arange(3), [0, 1, 2]),
        (np.array([np.nan]), [None]),
        ({1: {"k": [Path("p")]}}, {"1": {"k": ["p"]}}),
    ],
)
def test_results_become_json(capsys: pytest.CaptureFixture[str], value: Any, want: Any) -> None:
    Output(json=True).result({"value": value})
    assert json.loads(capsys.readouterr().out) == {"value": want}


def test_what_has_no_json_form_is_a_programming_error() -> None:
    with pytest.raises(TypeError, match="object has no JSON form"):
        Output(json=True).result({"value": object()})


def test_a_command_gives_one_result() -> None:
    output = Output()
    output.result({})
    with pytest.raises(RuntimeError, match="one result"):
        output.result({})


@pytest.mark.parametrize("as_json", [False, True])
def test_errors_are_two_lines_and_an_object(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    Output(json=as_json).error("port 0", hint="choose 1 to 65535", kind="ConfigError", exit_code=3)
    stdout, stderr = capsys.readouterr()
    assert stderr == "error: port 0\nhint: choose 1 to 65535\n"
    want = {"error": {"kind": "ConfigError", "message": "port 0", "hint": "choose 1 to 65535", "exit_code": 3}}
    assert (json.loads(stdout) if as_json else stdout) == (want if as_json else "")


def test_an_error_after_the_result_leaves_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(json=True)
    output.result({"done": True})
    output.error("too late")
    assert json.loads(capsys.readouterr().out) == {"done": True}


@given(st.text())
def test_foreign_text_cannot_drive_the_terminal(text: str) -> None:
    output = Output()
    with output.console.capture() as captured:
        output.say(text)
        output.warn(text)
    shown = captured.get()
    assert not any((character < " " and character not in "\n\t") or "\x7f" <= character < "\xa0" for character in shown)


def test_markup_of_foreign_text_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    Output().say("[bold]device[/bold] [link=x]")
    assert capsys.readouterr().err == "[bold]device[/bold] [link=x]\n"


@pytest.mark.parametrize("variable", ["NO_COLOR", "FORCE_COLOR"])
def test_colour_follows_the_environment(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    output = Output()
    with output.console.capture() as captured:
        output.warn("hot")
    assert ("\x1b[33m" in captured.get()) is (variable == "FORCE_COLOR")


def test_tables_are_aligned_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    Output().table(("board", "MiB"), [("超小", 512), ("a\tb\x1b", 8)])
    assert capsys.readouterr().out.splitlines() == [
        "board    MiB",
        "───────  ───",
        "超小     512",
        "a b\\x1b  8",
    ]
