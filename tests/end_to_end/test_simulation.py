"""A simulated run and a real one, over a broker and with processes, end with the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedzo.broker_server.history.replay import replay_run
from fedzo.simulation.settings import SimulationSettings
from fedzo.simulation.simulate import simulate
from tests.end_to_end.conftest import DEVICES, Finished, MakeFleet
from tests.end_to_end.fleet import agree, images


def simulated(path: Path, artifact: Path, data: list[Path]) -> str:
    """The digest of the same run, with one virtual device a file."""
    _, coordinator = replay_run(path)
    parts = [images(seed) for seed in range(DEVICES)]
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    clients = np.repeat(np.arange(DEVICES), [len(labels) for _, labels in parts])
    found = simulate(
        artifact, coordinator.run.settings, (x, y, clients), data[-1], SimulationSettings(split="natural", holdout=0.2)
    )
    assert found.devices_agree
    assert found.devices_done == DEVICES
    return found.digest


def test_a_simulation_ends_with_the_weights_of_a_real_run(
    undisturbed: Finished, artifact: Path, data: list[Path]
) -> None:
    assert simulated(undisturbed.fleet.path, artifact, data) == undisturbed.digest


@pytest.mark.parametrize(
    "options",
    [("split",), ("node",), ("coordinate",), ("stein", "--local-steps", 3, "--local-rate", 0.05)],
    ids=lambda options: " ".join(map(str, options)),
)
def test_so_it_does_with_every_estimator(
    options: tuple[object, ...], fleets: MakeFleet, artifact: Path, data: list[Path]
) -> None:
    fleet = fleets()
    server = fleet.serve("--k", 3, "--tail-k", 48, "--repeats", 4, "--estimator", *options)
    boards = fleet.devices()
    digest = agree(server.answer(), [board.answer() for board in boards])
    assert simulated(fleet.path, artifact, data) == digest
