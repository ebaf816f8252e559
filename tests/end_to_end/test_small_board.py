"""ResNet-20 on the smallest 64-bit board: a run under its profile's budget, and the refusal where memory is short."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedzo.hardware_profiles import load_profile
from tests.end_to_end.fleet import Fleet, agree

BOARD = "rpi-zero-2w"
CLASSES = 10


def write_noise(path: Path, seed: int, n: int = 20) -> Path:
    """Noise in the shape of CIFAR-10: what counts here is whether it runs."""
    rng = np.random.default_rng(seed)
    np.savez(path, x=rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8), y=np.arange(n) % CLASSES)
    return path


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    from fedzo.exporter.artifact import export_artifact

    artifact = tmp_path / "resnet20"
    export_artifact("resnet20", (3, 32, 32), CLASSES, 0.8, 1, artifact)
    (tmp_path / "fleet").mkdir()
    data = [write_noise(tmp_path / f"{seed}.npz", seed) for seed in range(3)]
    fleet = Fleet(tmp_path / "fleet", artifact, data[:1], data[2])
    yield fleet
    fleet.close()


def test_resnet20_runs_on_the_board_and_not_in_40_mib(fleet: Fleet) -> None:
    budget_mib = load_profile(BOARD).ram_budget_mib
    server = fleet.serve("--rounds", 2, "--k", 2, "--batch", 8, "--saliency-samples", 1, "--evaluate-every", 2)
    small = fleet.device(0, "--profile", BOARD, "--ram-budget-mib", 40, state="small")
    assert small.wait() == 4, small.stderr
    message, hint = small.error["message"], small.error["hint"]
    needed = re.fullmatch(
        r"resnet20 needs (\d+\.\d) MiB with \d+ weights and micro-batch 1, the budget is 40 MiB", message
    )
    assert needed is not None, message
    assert 40 < float(needed[1]) < budget_mib
    assert "use a board with" in hint

    (board,) = fleet.devices("--profile", BOARD)
    answer = board.answer()
    agree(server.answer(), [answer])
    assert answer["declined"] == 0
    assert float(needed[1]) <= answer["planned_peak_mib"] < budget_mib
    # The kernel's count holds under the board's budget, whatever code is resident.
    assert 0 < answer["peak_rss_mib"] < budget_mib
    assert f"budget {budget_mib:g} MiB" in board.stderr
