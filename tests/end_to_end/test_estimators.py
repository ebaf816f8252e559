"""Whole runs with every estimator: one digest, whatever dies."""

from __future__ import annotations

import signal

import pytest

from fedzo.broker_server.history.replay import replay_run
from fedzo.protocol.settings import LOCAL_ESTIMATORS
from fedzo.protocol.wire.codec import decode
from fedzo.protocol.wire.messages import Report, ReportKind
from tests.end_to_end.conftest import MakeFleet
from tests.end_to_end.fleet import agree

WITH_RESIDUAL = ("residual:1", "saved:4", "residual:4")
IN_STEPS = "node in steps"
RIGS = {
    "split": ("computing:2", "saved:4", "received:5"),
    "node": WITH_RESIDUAL,
    IN_STEPS: WITH_RESIDUAL,
    "coordinate": ("computing:2", "saved:4", "received:5"),
    "local": WITH_RESIDUAL,
    "local-node": ("residual:3", "saved:4", "received:5"),
}
SIZES = {
    **dict.fromkeys(("split", "node", IN_STEPS), (3, 48)),
    **dict.fromkeys(("local", "local-node"), (5, 9, 8, 11, 15)),
    "coordinate": (3,),
}
SETTINGS = ("--k", 3, "--tail-k", 48, "--repeats", 4)
STEPS = ("--local-steps", 3, "--local-rate", 0.05)


@pytest.mark.parametrize("name", RIGS)
def test_killed_devices_go_on_to_the_same_weights(name: str, fleets: MakeFleet) -> None:
    """What a sketch has not carried yet comes back from the disk, bit for bit, also between residual and outbox."""
    estimator = name.split(maxsplit=1)[0]
    settings = ("--estimator", estimator, *SETTINGS, *(STEPS if name == IN_STEPS else ()))
    is_local = estimator in LOCAL_ESTIMATORS
    quiet = fleets(local_heads=is_local)
    server = quiet.serve(*settings)
    boards = quiet.devices()
    undisturbed = agree(server.answer(), [board.answer() for board in boards])
    _, coordinator = replay_run(quiet.path)
    assert coordinator.replica.digest.hex() == undisturbed
    messages = [decode(entry.payload) for entry in quiet.entries("report")]
    probes = [m for m in messages if isinstance(m, Report) and m.kind is ReportKind.PROBE]
    assert [tuple(block.size for block in report.blocks) for report in probes] == [SIZES[name]] * len(probes)
    moving = [float(abs(block).max()) > 0 for report in probes for block in report.blocks]
    # Three weights may all belong to units that are shut.
    assert any(moving) if estimator == "coordinate" else all(moving)

    fleet = fleets(local_heads=is_local)
    server = fleet.serve(*settings)
    dying = [fleet.device(number, rig=rig) for number, rig in enumerate(RIGS[name])]
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


@pytest.mark.parametrize(("estimator", "local_heads"), [("local", False), ("local-node", False), ("node", True)])
def test_heads_and_estimators_that_do_not_fit_are_refused(estimator: str, local_heads: bool, fleets: MakeFleet) -> None:
    fleet = fleets(local_heads=local_heads)
    server = fleet.serve("--estimator", estimator, *SETTINGS)
    assert server.wait() == 3
    assert "local heads" in server.error["message"]
    assert "--local-heads" in server.error["hint"]
