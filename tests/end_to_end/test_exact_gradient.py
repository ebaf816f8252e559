"""A round that covers the whole Hadamard basis gives the gradient itself: two devices against torch's autograd.

The network is a user's own, with smooth activations: where a rectifier has its kink there is no derivative, and in
LeNet-5, whose biases begin at zero, many units begin there.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from fedzo.broker_server.history.replay import replay_run
from fedzo.protocol.perturbation.blocks import directions_of
from fedzo.protocol.replay.update import estimate_gradient
from fedzo.protocol.server_side.coordinator import Coordinator
from fedzo.protocol.wire.codec import decode
from fedzo.protocol.wire.messages import UpdateRecord
from tests.end_to_end import smooth_lenet
from tests.end_to_end.conftest import MakeFleet
from tests.end_to_end.fleet import agree, images

BATCH = 8
RATE = 0.5


def autograd(coordinator: Coordinator, weights: NDArray[np.float32], data: list[Path]) -> NDArray[np.float64]:
    """Gradient of the mean loss over the files at the surviving weights, in double precision."""
    layout, kept = coordinator.manifest.layout, coordinator.mask.kept
    dense = np.zeros(layout.size)
    dense[kept] = weights
    network = smooth_lenet.build().double()
    parameters = dict(network.named_parameters())
    assert [parameter.name for parameter in layout.parameters] == list(parameters)
    for k, parameter in enumerate(parameters.values()):
        parameter.data = torch.from_numpy(dense[layout.slice_of(k)].reshape(parameter.shape))
    x = torch.from_numpy(np.concatenate([np.load(path)["x"] for path in data]).astype(np.float64) / 255)
    y = torch.from_numpy(np.concatenate([np.load(path)["y"] for path in data]))
    gradients = torch.autograd.grad(functional.cross_entropy(network(x), y), list(parameters.values()))
    return np.asarray(np.concatenate([gradient.numpy().ravel() for gradient in gradients])[kept])


@pytest.mark.parametrize("assignment", ["dealt", "shared"])
def test_the_whole_basis_gives_the_gradient(assignment: str, fleets: MakeFleet) -> None:
    fleet = fleets(2)
    for number in range(2):
        # Dealt rows see the same loss only if every device has the same samples; shared ones are averaged.
        x, y = images(1 if assignment == "dealt" else number, BATCH)
        fleet.data[number] = fleet.folder / f"eight-{number}.npz"
        np.savez(fleet.data[number], x=x, y=y)
    shutil.copy(smooth_lenet.__file__, fleet.folder / "my_lenet.py")
    fleet.artifact = fleet.folder / "artifact"
    fleet.fedzo(
        "export", "my_lenet:build", "--input", "1x16x16", "--classes", 4, "--sparsity", 0.5, "-o", fleet.artifact
    )
    k = 512 if assignment == "dealt" else 1024
    options = ("--rounds", 1, "--k", k, "--assign", assignment, "--two-sided", "--sigma", 2.0**-10, "--batch", BATCH)
    optimiser = ("--optimiser", "sgd", "--learning-rate", RATE, "--sparsity", 0.5, "--evaluate-every", 0)
    server, boards = fleet.serve(*options, *optimiser), fleet.devices("--holdout", 0)
    answer = server.answer()
    agree(answer, [board.answer() for board in boards])
    assert 512 < answer["survivors"] <= 1024

    _, coordinator = replay_run(fleet.path)
    replica = coordinator.replica
    trained = replica.weights.copy()
    replica.restore_from_start()
    (entry,) = fleet.entries("update")
    record = decode(entry.payload)
    assert isinstance(record, UpdateRecord)
    assert record.coefficients.size == replica.blocks[0].n_positions == 1024

    exact = autograd(coordinator, replica.weights, fleet.data)
    estimate = estimate_gradient(replica.blocks, directions_of(replica.blocks, coordinator.run.settings.seed), record)
    error = float(np.linalg.norm(estimate - exact) / np.linalg.norm(exact))
    assert np.linalg.norm(exact) > 0.1
    assert error < 1e-3
    # And the step that everybody took is the one of plain gradient descent.
    assert np.abs(trained - (replica.weights - RATE * exact)).max() < 1e-3
