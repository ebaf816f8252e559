"""Boards whose memory plan does not hold, under real limits: one is lowered, one excused, and the run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedzo.edge_runtime.inference.ort import arena_limit_holds
from fedzo.protocol.wire.codec import decode
from fedzo.protocol.wire.messages import Decline, Report
from tests.arena_need import arena_need
from tests.end_to_end.conftest import MakeFleet
from tests.end_to_end.fleet import Fleet, agree

pytestmark = pytest.mark.skipif(not arena_limit_holds(), reason="this onnxruntime does not enforce the arena's limit")
SAMPLES = 8  # of a batch, see Fleet.serve


def micro_batches(fleet: Fleet, device: str) -> list[tuple[int, Decline]]:
    """Micro-batch and decline of a device's reports, one after another; repetitions left out."""
    reports = [decode(entry.payload) for entry in fleet.entries("report") if entry.device == device]
    said = [(report.micro_batch, report.decline) for report in reports if isinstance(report, Report)]
    return list(dict.fromkeys(said))


def test_a_board_is_lowered_and_one_excused_and_the_run_goes_on(fleets: MakeFleet, artifact: Path) -> None:
    between = (arena_need(artifact, 2, SAMPLES) + arena_need(artifact, 4, SAMPLES)) // 2
    fleet = fleets(3)
    server = fleet.serve("--quorum", 2)
    boards = [fleet.device(0), fleet.device(1, rig=f"arena:{between}"), fleet.device(2, rig="arena:4096")]
    answer = server.answer()
    agree(answer, [board.answer() for board in boards[:2]])
    assert (answer["rounds"], answer["devices"], answer["refused"]) == (6, 3, 0)

    over, fine = Decline.OVER_BUDGET, Decline.NONE
    assert micro_batches(fleet, "board-0") == [(8, fine)]
    assert micro_batches(fleet, "board-1") == [(8, over), (4, over), (2, fine)]
    assert micro_batches(fleet, "board-2") == [(8, over), (4, over), (2, over), (1, over)]
    assert "board-1 may use a micro-batch of 4 at most" in server.stderr
    assert "board-1 may use a micro-batch of 2 at most" in server.stderr
    assert "board-1 is excused" not in server.stderr

    assert boards[2].wait() == 4
    assert boards[2].error["kind"] == "MemoryBudgetError"
    assert "micro-batch of 1" in boards[2].error["message"]
    assert "cannot compute as planned" in boards[2].stderr
    assert answer["excused"] == ["board-2: over the memory budget with a micro-batch of 1"]
    assert "board-2 is excused from the run: over the memory budget with a micro-batch of 1" in server.stderr


def test_every_board_is_needed_and_lowered(fleets: MakeFleet, artifact: Path) -> None:
    """Below the quorum the round is not lost: it is done again when the boards have planned again."""
    between = (arena_need(artifact, 4, SAMPLES) + arena_need(artifact, 8, SAMPLES)) // 2
    fleet = fleets(2)
    server, boards = fleet.serve(), fleet.devices(rig=f"arena:{between}")
    answer = server.answer()
    agree(answer, [board.answer() for board in boards])
    assert answer["excused"] == []
    for name in ("board-0", "board-1"):
        assert micro_batches(fleet, name) == [(8, Decline.OVER_BUDGET), (4, Decline.NONE)]
