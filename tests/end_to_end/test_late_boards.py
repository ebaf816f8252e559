"""A board that comes when most of the run is over: by the log, or by a snapshot where the operator allows it."""

from __future__ import annotations

import signal

import pytest

from fedzo.broker_server.history.replay import replay_run
from tests.end_to_end.conftest import MakeFleet
from tests.end_to_end.fleet import agree


@pytest.mark.parametrize("snapshots", [False, True])
def test_a_board_that_joins_late_gets_to_the_same_weights(snapshots: bool, fleets: MakeFleet) -> None:
    fleet = fleets()
    options = ("--devices", 2, "--quorum", 2, "--rounds", 80, "--k", 128, "--optimiser", "sgd", "--evaluate-every", 0)
    server = fleet.serve(*options, "--snapshots" if snapshots else "--no-snapshots")
    boards = [fleet.device(0), fleet.device(1)]
    fleet.await_entries("update", 40)
    for board in boards:  # so that the run is not over before the third one is there
        board.signal(signal.SIGSTOP)
    boards.append(fleet.device(2))
    boards[2].until("fits")
    for board in boards[:2]:
        board.signal(signal.SIGCONT)
    answers = [board.answer() for board in boards]
    digest = agree(server.answer(), answers)
    folder, coordinator = replay_run(fleet.path)
    assert coordinator.replica.digest.hex() == digest
    log = sum(len(entry.payload) for entry in fleet.entries("update"))
    assert log > 2 * coordinator.replica.snapshot_bytes  # else nobody would need one
    manifest, down = folder.artifact.manifest, answers[2]["bytes_down"]
    files = [*manifest.graphs, *(variant.file for variant in manifest.variants)]
    if snapshots:
        assert down < sum(file.size for file in files) + log
    else:
        assert down > log
