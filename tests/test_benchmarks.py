"""The memory and footprint benchmarks run, and their figures are what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.board_fixture import ROOT

needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system has no /proc")


def report(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", *arguments, "--json"], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    data: dict[str, Any] = json.loads(done.stdout)
    return data


@needs_proc
def test_memory() -> None:
    pytest.importorskip("torch", reason="fedzo[server] is not installed")
    data = report("benchmarks.memory", "--models", "lenet5", "--batches", "8", "--sparsities", "0")
    training, run = data["rows"]
    assert (training["phase"], run["phase"]) == ("training", "run")
    assert training["planned_mib"] == pytest.approx(run["planned_mib"], abs=0.01)
    worst = max(abs(row["planned_mib"] - row["measured_mib"]) / row["measured_mib"] for row in data["rows"])
    assert data["figures"]["plan_worst_error_percent"] == pytest.approx(100 * worst)
    # The plan's floor was measured with onnxruntime 1.32.0; 1.19.2 needs 13 MiB less. Of the same libraries 22 to 33
    # MiB of code are resident, as the page cache has it.
    assert data["figures"]["plan_worst_under_mib"] < 14
    assert worst < 0.25


@pytest.mark.network
@pytest.mark.slow
def test_footprint() -> None:
    data = report("benchmarks.footprint", "--without-flower")
    (board,) = data["rows"]
    assert "fedzo " in board["versions"]
    assert 3 < data["figures"]["board_install_packages"] == board["packages"] <= 8
    assert 50 < board["without_pyc_mb"] < board["mb"] == data["figures"]["board_install_mb"] <= 200
