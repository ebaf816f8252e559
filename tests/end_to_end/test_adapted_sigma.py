"""A sigma that is far too small or too large is corrected within a few rounds: real engine, autograd beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from fedzo.edge_runtime.datasets.data import Batch
from fedzo.edge_runtime.estimation.block_estimators import ProbeRequest, make_estimator
from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.exporter.artifact import export_artifact
from fedzo.protocol.perturbation.blocks import deal, whole_block
from fedzo.protocol.perturbation.directions import Directions
from fedzo.protocol.pruning.mask import Mask
from fedzo.protocol.server_side.adaptation import next_sigma
from fedzo.protocol.settings import TrainingSettings
from fedzo.protocol.wire.messages import Report, ReportKind
from tests.end_to_end import smooth_lenet
from tests.end_to_end.fleet import images

K, ROUNDS, SEED = 128, 8, 5


@dataclass(frozen=True)
class Trained:
    """A network after some steps of gradient descent."""

    engine: Engine
    weights: NDArray[np.float32]
    gradient: NDArray[np.float64]
    batch: Batch


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder: Path = tmp_path_factory.mktemp("smooth") / "artifact"
    export_artifact(f"{smooth_lenet.__name__}:build", (1, 16, 16), 4, 0.0, 1, folder)
    pixels, y = images(1, 16)
    x = (pixels.astype(np.float32) / 255.0 - 0.5) * 2.0
    torch.manual_seed(1)
    network = smooth_lenet.build()
    parameters = list(network.parameters())

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(
            functional.cross_entropy(network(torch.from_numpy(x)), torch.from_numpy(y)), parameters
        )

    for _ in range(150):
        for parameter, step in zip(parameters, gradients(), strict=True):
            parameter.data -= 0.5 * step
    weights, gradient = (np.concatenate([p.detach().numpy().ravel() for p in ps]) for ps in (parameters, gradients()))
    artifact = load_artifact(folder)
    with Engine(artifact, Mask.dense(artifact.manifest.layout)) as engine:
        yield Trained(engine, weights, gradient.astype(np.float64), Batch(x, y))


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("start", [1e-7, 0.1])
def test_the_gradient_comes_back(trained: Trained, start: float, two_sided: bool) -> None:
    blocks = whole_block("hadamard", trained.weights.size, K)
    training = TrainingSettings(k=K, sigma=1e-3, two_sided=two_sided)
    estimator, basis = make_estimator(training, blocks, SEED), Directions("hadamard", SEED, trained.weights.size)
    sigma, cosines = float(np.float32(start)), []
    for round_ in range(ROUNDS):
        deals = deal(blocks, "shared", round_, 1)
        positions = deals[0].positions(0)
        found = estimator.probe(
            trained.engine, ProbeRequest(trained.weights, trained.batch, round_, 0, (positions,), sigma)
        )
        exact = basis.project(round_, positions, trained.gradient.astype(np.float32))
        scalars = found.blocks[0].astype(np.float64)
        cosines.append(float(scalars @ exact / np.linalg.norm(scalars) / np.linalg.norm(exact)))
        report = Report(
            ReportKind.PROBE, bytes(4), round_, 1, 16, bytes(16), found.mean_loss, found.queries, 0, 0, found.blocks
        )
        sigma = next_sigma(sigma, deals, [report], two_sided=two_sided)
    assert cosines[0] < 0.97
    assert min(cosines[-3:]) > 0.999, (cosines, sigma)
    assert 1e-6 < sigma < 1e-3
