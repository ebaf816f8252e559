"""Rounds that do not wait for a slow board, whose reports count in later updates."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedzo.broker_server.history.replay import replay_run
from fedzo.protocol.wire.codec import decode
from fedzo.protocol.wire.messages import UpdateRecord
from tests.end_to_end.conftest import MakeFleet
from tests.end_to_end.fleet import agree

SLOW = """
import sys, time
from fedzo.edge_runtime import __main__
from fedzo.edge_runtime.estimation import estimators
measure = estimators.SteinEstimator.measure
def slowly(*arguments, **keywords):
    time.sleep(0.15)
    return measure(*arguments, **keywords)
estimators.SteinEstimator.measure = slowly
sys.exit(__main__.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("estimator", ["node"])
def test_a_slow_board_counts_late_and_ends_with_the_same_weights(
    estimator: str, fleets: MakeFleet, tmp_path: Path
) -> None:
    fleet = fleets()
    options = ("--quorum", 2, "--close-at", 2, "--staleness", 20, "--rounds", 24, "--evaluate-every", 0)
    server = fleet.serve(*options, "--estimator", estimator, "--k", 4, "--tail-k", 24, "--repeats", 2)
    program = tmp_path / "slow.py"
    program.write_text(SLOW)
    boards = [fleet.device(0), fleet.device(1), fleet.device(2, program=(sys.executable, program))]
    digest = agree(server.answer(), [board.answer() for board in boards])
    _, coordinator = replay_run(fleet.path)
    assert coordinator.replica.digest.hex() == digest
    updates = [decode(entry.payload) for entry in fleet.entries("update")]
    assert any(isinstance(update, UpdateRecord) and update.ages for update in updates)
    reports = [(entry.round, entry.device) for entry in fleet.entries("report")]
    assert len(reports) == len(set(reports))
