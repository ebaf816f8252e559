"""Boards with the base package alone train: the newest libraries and the oldest that are supported, in one run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.board_fixture import pip
from tests.end_to_end.conftest import MakeFleet
from tests.end_to_end.fleet import agree

OLD = ("onnxruntime==1.17.3", "numpy==1.26.4", "paho-mqtt==2.0.0")

pytestmark = [pytest.mark.network, pytest.mark.slow]


@pytest.fixture(scope="session")
def old_venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a virtual environment with the oldest libraries that there are wheels of for this Python."""
    if sys.version_info >= (3, 13):
        pytest.skip("onnxruntime 1.17 has no wheels for this Python")
    folder = tmp_path_factory.mktemp("old") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    python = folder / "bin" / "python"
    pip("--python", python, "install", "--only-binary=:all:", *OLD, wheel)
    return python


def test_a_run_of_nothing_but_base_packages(board_venv: Path, fleets: MakeFleet) -> None:
    fleet = fleets()
    server = fleet.serve()
    program = (board_venv.parent / "fedzo-device",)
    boards = [fleet.device(number, program=program, PYTHONPATH="") for number in range(3)]
    agree(server.answer(), [board.answer() for board in boards])
    modules = subprocess.run(
        [board_venv, "-c", "import torch"], capture_output=True, text=True, env={"PYTHONPATH": ""}, timeout=60
    )
    assert "No module named 'torch'" in modules.stderr


def test_old_and_new_libraries_end_with_the_same_weights(board_venv: Path, old_venv: Path, fleets: MakeFleet) -> None:
    fleet = fleets()
    server = fleet.serve()
    boards = [
        fleet.device(number, program=(python.parent / "fedzo-device",), PYTHONPATH="")
        for number, python in enumerate((board_venv, old_venv))
    ]
    boards.append(fleet.device(2))
    agree(server.answer(), [board.answer() for board in boards])
    found = {entry.device: entry.payload.decode() for entry in fleet.entries("enrolment")}
    assert re.search(r"numpy 1\.26\.4.*onnxruntime 1\.17\.3|onnxruntime 1\.17\.3.*numpy 1\.26\.4", found["board-1"])
    assert "1.17.3" not in found["board-0"]
    assert "warning" not in boards[1].stderr
