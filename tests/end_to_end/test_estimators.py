"""Whole runs with every estimator: one digest, whatever dies."""

from __future__ import annotations

import signal

import pytest

from fedzo.broker_server.replay import replay_run
from fedzo.protocol.codec import decode
from fedzo.protocol.messages import Report, ReportKind
from tests.end_to_end.conftest import MakeFleet
from tests.end_to_end.fleet import agree

RIGS = {"split": ("computing:2", "saved:4", "received:5"), "node": ("residual:1", "saved:4", "residual:4")}
SETTINGS = ("--k", 3, "--tail-k", 48, "--repeats", 4)


@pytest.mark.parametrize("estimator", ["split", "node"])
def test_killed_devices_go_on_to_the_same_weights(estimator: str, fleets: MakeFleet) -> None:
    """What a sketch has not carried yet comes back from the disk, bit for bit, also between residual and outbox."""
    quiet = fleets()
    server = quiet.serve("--estimator", estimator, *SETTINGS)
    boards = quiet.devices()
    undisturbed = agree(server.answer(), [board.answer() for board in boards])
    _, coordinator = replay_run(quiet.path)
    assert coordinator.replica.digest.hex() == undisturbed
    messages = [decode(entry.payload) for entry in quiet.entries("report")]
    probes = [m for m in messages if isinstance(m, Report) and m.kind is ReportKind.PROBE]
    assert [tuple(block.size for block in report.blocks) for report in probes] == [(3, 48)] * len(probes)
    assert all(float(abs(block).max()) > 0 for report in probes for block in report.blocks)

    fleet = fleets()
    server = fleet.serve("--estimator", estimator, *SETTINGS)
    dying = [fleet.device(number, rig=rig) for number, rig in enumerate(RIGS[estimator])]
    again = []
    for number, board in enumerate(dying):
        assert board.wait() == -signal.SIGKILL, (board.name, board.stderr)
        again.append(fleet.device(number))
    assert agree(server.answer(), [board.answer() for board in again]) == undisturbed


def test_an_estimator_that_the_model_cannot_have_is_refused(fleets: MakeFleet) -> None:
    fleet = fleets()
    server = fleet.serve("--estimator", "nonsense")
    assert server.wait() == 3
    assert "stein, split, node" in server.error["message"]
