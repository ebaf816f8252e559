"""Node perturbation: its gradient of the fully connected layers is that of backpropagation, but for noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from fedzo.edge_runtime.artifact import Artifact, load_artifact
from fedzo.edge_runtime.engine import Engine
from fedzo.edge_runtime.loss import NonFiniteLossError
from fedzo.edge_runtime.tail import TailGradient, tail_gradient
from fedzo.exporter.artifact import export_artifact
from fedzo.exporter.reference import network
from fedzo.protocol.errors import ArtifactError
from fedzo.protocol.layout import initial_weights
from fedzo.protocol.manifest import golden_batch
from fedzo.protocol.mask import Mask, threshold

from .conftest import Tiny

SIGMA = np.float32(1e-3)
MODELS = {"lenet5": (1, 32, 32), "resnet8": (3, 16, 16)}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    found = {}
    for model, shape in MODELS.items():
        folder = tmp_path_factory.mktemp("tail") / model
        export_artifact(model, shape, 10, 0.5, 3, folder)
        found[model] = load_artifact(folder)
    return found


def backpropagated(
    model: str, artifact: Artifact, mask: Mask, x: NDArray[np.float32], y: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The gradient of all survivors, by torch."""
    layout = artifact.manifest.layout
    dense = np.where(mask.kept, initial_weights(layout, 3), np.float32(0.0))
    parameters = {
        p.name: torch.tensor(dense[layout.slice_of(k)].reshape(p.shape), requires_grad=True)
        for k, p in enumerate(layout.parameters)
    }
    loss = functional.cross_entropy(network(model)(parameters, torch.from_numpy(x)), torch.from_numpy(y))
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return np.concatenate([g.numpy().ravel() for g in gradients])[mask.kept]


def estimated(
    artifact: Artifact,
    mask: Mask,
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    repeats: int,
    *,
    micro_batch: int = 32,
    index: int = 0,
) -> TailGradient:
    weights = initial_weights(artifact.manifest.layout, 3)[mask.survivors()]
    with Engine(artifact, mask, micro_batch=micro_batch) as engine:
        return tail_gradient(
            engine, weights, x, y, repeats=repeats, sigma=SIGMA, seed=5, round_=2, index=index
        )  # fmt: skip


@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_the_estimate_is_the_gradient_but_for_noise(artifacts: dict[str, Artifact], sparsity: float) -> None:
    artifact = artifacts["lenet5"]
    layout = artifact.manifest.layout
    mask = threshold(layout, np.abs(initial_weights(layout, 3)), sparsity) if sparsity else Mask.dense(layout)
    x, y = golden_batch(MODELS["lenet5"], 10, 1, 24)
    found = estimated(artifact, mask, x, y, 2_000)
    exact = backpropagated("lenet5", artifact, mask, x, y)[found.first :]
    assert found.values.shape == exact.shape
    cosine = found.values @ exact / np.linalg.norm(found.values) / np.linalg.norm(exact)
    assert cosine > 0.93
    assert np.linalg.norm(found.values) / np.linalg.norm(exact) == pytest.approx(1.0, abs=0.25)
    # The last layer has no noise at all.
    last = int(mask.counts()[-2:].sum())
    np.testing.assert_allclose(found.values[-last:], exact[-last:], rtol=1e-3, atol=1e-5)


def test_more_repeats_are_less_noise(artifacts: dict[str, Artifact]) -> None:
    artifact = artifacts["lenet5"]
    mask = Mask.dense(artifact.manifest.layout)
    x, y = golden_batch(MODELS["lenet5"], 10, 1, 16)
    exact = backpropagated("lenet5", artifact, mask, x, y)
    errors = []
    for repeats in (8, 128):
        found = estimated(artifact, mask, x, y, repeats)
        errors.append(float(np.linalg.norm(found.values - exact[found.first :])))
    assert errors[1] / errors[0] == pytest.approx(0.25, rel=0.25)  # the square root of 16


def test_a_single_layer_needs_no_noise(artifacts: dict[str, Artifact]) -> None:
    artifact = artifacts["resnet8"]
    mask = Mask.dense(artifact.manifest.layout)
    x, y = golden_batch(MODELS["resnet8"], 10, 1, 9)
    found = estimated(artifact, mask, x, y, 16)
    exact = backpropagated("resnet8", artifact, mask, x, y)[found.first :]
    assert found.passes == 1
    np.testing.assert_allclose(found.values, exact, rtol=1e-3, atol=1e-5)


def test_micro_batches_change_nothing(artifacts: dict[str, Artifact]) -> None:
    artifact = artifacts["lenet5"]
    mask = Mask.dense(artifact.manifest.layout)
    x, y = golden_batch(MODELS["lenet5"], 10, 1, 11)
    whole, parts = (estimated(artifact, mask, x, y, 4, micro_batch=m) for m in (32, 3))
    np.testing.assert_allclose(whole.losses, parts.losses, rtol=1e-6)
    error = np.linalg.norm(whole.values - parts.values) / np.linalg.norm(whole.values)
    assert error < 0.02  # a loss that differs in its last bit is divided by sigma


def test_every_device_has_noise_of_its_own(artifacts: dict[str, Artifact]) -> None:
    artifact = artifacts["lenet5"]
    mask = Mask.dense(artifact.manifest.layout)
    x, y = golden_batch(MODELS["lenet5"], 10, 1, 5)
    first, again, other = (estimated(artifact, mask, x, y, 2, index=i) for i in (1, 1, 2))
    assert np.array_equal(first.values, again.values)
    assert not np.array_equal(first.values, other.values)


def test_the_cost_is_counted(artifacts: dict[str, Artifact]) -> None:
    artifact = artifacts["lenet5"]
    weights = initial_weights(artifact.manifest.layout, 3)
    x, y = golden_batch(MODELS["lenet5"], 10, 1, 5)
    called: list[int] = []
    with Engine(artifact, Mask.dense(artifact.manifest.layout)) as engine:
        found = tail_gradient(
            engine, weights, x, y, repeats=6, sigma=SIGMA, seed=5, round_=2, index=0,
            before_pass=lambda: called.append(1),
        )  # fmt: skip
        assert (found.passes, len(called)) == (7, 8)
        assert engine.sample_passes == pytest.approx(5 * (1 + 6 * 0.14146), rel=1e-3)


def test_bad_input_is_refused(artifacts: dict[str, Artifact], tiny: Tiny) -> None:
    artifact = artifacts["lenet5"]
    x, y = golden_batch(MODELS["lenet5"], 10, 1, 5)
    arguments = {"repeats": 1, "sigma": SIGMA, "seed": 5, "round_": 2, "index": 0}
    with Engine(artifact, Mask.dense(artifact.manifest.layout)) as engine:
        huge = np.full(engine.n_survivors, np.float32(3e38))
        with pytest.raises(NonFiniteLossError, match="diverged"):
            tail_gradient(engine, huge, x, y, **arguments)  # type: ignore[arg-type]
    with Engine(tiny.artifact, tiny.half) as engine, pytest.raises(ArtifactError, match="no dense tail"):
        tail_gradient(engine, engine.weights_feed, tiny.x, tiny.y, **arguments)  # type: ignore[arg-type]
