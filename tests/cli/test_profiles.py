"""`fedzo profiles`: what it prints, for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedzo.cli.main import main
from fedzo.hardware_profiles import list_profiles, load_profile


def test_the_list_has_a_row_a_board(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles", "list"]) == 0
    heading, *rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    boards = list_profiles()
    assert [row[0] for row in rows] == [board.name for board in boards]
    budget = heading.index("budget MiB")
    assert [int(row[budget]) for row in rows] == [board.ram_budget_mib for board in boards]


def test_a_board_is_shown_with_its_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles", "show", "rpi-zero-2w"]) == 0
    rows = {row[0]: row[1:] for row in (line.split("\t") for line in capsys.readouterr().out.splitlines()[1:])}
    board = load_profile("rpi-zero-2w")
    assert rows["ram_budget_mib"] == [str(board.ram_budget_mib), board.sources["ram_budget_mib"]]
    assert rows["isa"][0] == ", ".join(board.isa)
    assert set(board.sources) <= set(rows)


def test_programs_get_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles", "show", "rpi-zero-2w", "--json"]) == 0
    board = load_profile("rpi-zero-2w")
    profile = json.loads(capsys.readouterr().out)["profile"]
    assert profile["ram_budget_mib"] == board.ram_budget_mib
    assert profile["sources"] == dict(board.sources)
    assert main(["profiles", "list", "--json"]) == 0
    assert profile in json.loads(capsys.readouterr().out)["profiles"]


def test_a_profile_of_the_users_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = Path(load_profile("generic-x86").origin).read_text().replace("generic-x86", "my-pc")
    path = tmp_path / "my-pc.toml"
    path.write_text(text)
    assert main(["profiles", "show", str(path)]) == 0
    assert "name\tmy-pc\t" in capsys.readouterr().out


def test_an_unknown_board_gets_near_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles", "show", "rpi-zero"]) == 3
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert "did you mean rpi-zero-2w" in stderr
