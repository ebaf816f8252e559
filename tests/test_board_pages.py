"""The pages of docs/boards: their commands are commands, and pip finds the versions that they name."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from fedzo.cli.app import app
from fedzo.edge_runtime.__main__ import _parser
from fedzo.exporter.board_wheels import Board
from tests.board_fixture import ROOT, pip

PAGES = [*sorted((ROOT / "docs" / "boards").glob("*.md")), ROOT / "docs" / "boards.md"]
ROW = re.compile(r"\| (3\.\d+) \| (2\.\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE)
BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
ROWS = [
    pytest.param(*found, id=f"{path.stem}-{found[0]}-{found[1]}")
    for path in PAGES
    for found in ROW.findall(path.read_text(encoding="utf-8"))
]


def commands(path: Path, program: str) -> list[list[str]]:
    """The arguments of every line that starts this program."""
    blocks = BLOCK.findall(path.read_text(encoding="utf-8"))
    lines = [line[2:] for block in blocks for line in block.splitlines()]
    words = [shlex.split(line.removeprefix("sudo ")) for line in lines]
    return [rest for first, *rest in words if Path(first).name == program]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_commands_are_commands(path: Path) -> None:
    for arguments in commands(path, "fedzo-device"):
        _parser().parse_args(arguments)  # ends the process with 2 where it is wrong
    group = typer.main.get_command(app)
    for name, *arguments in commands(path, "fedzo"):
        if name != "profiles":  # a group of its own
            group.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]  # a group
    assert commands(path, "fedzo-device") or commands(path, "fedzo")


def test_there_are_versions_to_check() -> None:
    assert len(ROWS) == 6


@pytest.mark.network
@pytest.mark.parametrize(("python", "glibc", "onnxruntime", "numpy", "paho"), ROWS)
def test_pip_finds_the_wheels(python: str, glibc: str, onnxruntime: str, numpy: str, paho: str, tmp_path: Path) -> None:
    """For that Python and C library, without compiling."""
    board = Board("aarch64", python, int(glibc.removeprefix("2.")))
    report = tmp_path / "report.json"
    nowhere = ["--dry-run", "--ignore-installed", "--quiet", f"--target={tmp_path}/never", f"--report={report}"]
    wanted = {"onnxruntime": onnxruntime, "numpy": numpy, "paho-mqtt": paho}
    pip("install", *board.options, *nowhere, *(f"{name}=={version}" for name, version in wanted.items()))
    found = {item["metadata"]["name"]: item for item in json.loads(report.read_text())["install"]}
    assert {name: found[name]["metadata"]["version"] for name in wanted} == wanted
    for name in ("onnxruntime", "numpy"):
        assert "aarch64" in found[name]["download_info"]["url"]
