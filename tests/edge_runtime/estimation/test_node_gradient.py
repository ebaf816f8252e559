"""Node perturbation: its gradient of all but the first layers is that of backpropagation, but for noise."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from fedzo.edge_runtime.estimation.block_estimators import estimator_bytes
from fedzo.edge_runtime.estimation.node_gradient import NodeGradient, NodeNoise, node_gradient
from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.inference.loss import NonFiniteLossError
from fedzo.edge_runtime.planning.memory import further_session_bytes
from fedzo.edge_runtime.storage.artifact import Artifact, load_artifact
from fedzo.exporter.artifact import export_artifact
from fedzo.exporter.reference import network
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import golden_batch
from fedzo.protocol.artifact.node_stages import noisy_stages
from fedzo.protocol.errors import ArtifactError
from fedzo.protocol.pruning.mask import Mask, threshold
from fedzo.protocol.settings import TrainingSettings

from ..conftest import Tiny

SIGMA = np.float32(1e-3)
MODELS = {"lenet5": (1, 32, 32), "resnet8": (3, 16, 16), "cnn1d": (3, 64)}


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


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def estimated(
    artifact: Artifact,
    mask: Mask,
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    repeats: int,
    *,
    micro_batch: int = 32,
    index: int = 0,
) -> NodeGradient:
    weights = initial_weights(artifact.manifest.layout, 3)[mask.survivors()]
    with Engine(artifact, mask, micro_batch=micro_batch) as engine:
        return node_gradient(engine, weights, x, y, NodeNoise(repeats, SIGMA, 5, 2, index))


@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_the_estimate_is_the_gradient_but_for_noise(artifacts: dict[str, Artifact], sparsity: float) -> None:
    artifact = artifacts["lenet5"]
    layout = artifact.manifest.layout
    mask = threshold(layout, np.abs(initial_weights(layout, 3)), sparsity) if sparsity else Mask.dense(layout)
    x, y = golden_batch(MODELS["lenet5"], 10, 1, 24)
    found = estimated(artifact, mask, x, y, 2_000)
    exact = backpropagated("lenet5", artifact, mask, x, y)[found.first :]
    assert found.values.shape == exact.shape
    assert cosine(found.values, exact) > 0.9
    assert np.linalg.norm(found.values) / np.linalg.norm(exact) == pytest.approx(1.0, abs=0.25)
    # The last layer has no noise at all.
    last = int(mask.counts()[-2:].sum())
    np.testing.assert_allclose(found.values[-last:], exact[-last:], rtol=1e-3, atol=1e-5)


def test_a_stage_learns_from_noise_on_its_output(artifacts: dict[str, Artifact]) -> None:
    """LeNet-5's second convolution has more weights than outputs, its first one fewer."""
    artifact = artifacts["lenet5"]
    assert [stage.number for stage in noisy_stages(artifact.manifest)] == [1]
    mask = Mask.dense(artifact.manifest.layout)
    x, y = golden_batch(MODELS["lenet5"], 10, 1, 24)
    found = estimated(artifact, mask, x, y, 2_000)
    assert found.first == 156
    exact, end = backpropagated("lenet5", artifact, mask, x, y)[156:], 2_416
    for part, least in ((slice(0, end), 0.8), (slice(end, None), 0.93)):
        assert cosine(found.values[part], exact[part]) > least


def test_noise_goes_through_the_stages_behind(artifacts: dict[str, Artifact]) -> None:
    """Of a chain of three convolutions the last two have noise; what one yields, the next one reads."""
    artifact = artifacts["cnn1d"]
    manifest, mask = artifact.manifest, Mask.dense(artifact.manifest.layout)
    stages = noisy_stages(manifest)
    assert [stage.number for stage in stages] == [1, 2]
    x, y = golden_batch(MODELS["cnn1d"], 10, 1, 24)
    found, exact = estimated(artifact, mask, x, y, 2_000), backpropagated("cnn1d", artifact, mask, x, y)
    first = mask.n_survivors - found.values.size
    assert found.first == first
    for stage in stages:
        offsets = manifest.layout.offsets
        part = slice(int(offsets[stage.first_parameter]), int(offsets[stage.end_parameter]))
        assert cosine(found.values[part.start - first : part.stop - first], exact[part]) > 0.8
    parts = estimated(artifact, mask, x, y, 2, micro_batch=7)
    assert cosine(parts.values, estimated(artifact, mask, x, y, 2).values) > 0.999


def test_every_graph_that_is_loaded_at_once_is_planned(artifacts: dict[str, Artifact]) -> None:
    """The tail's, which the plan counts, and those of the noisy stages but the first one."""
    manifest, mask = artifacts["cnn1d"].manifest, Mask.dense(artifacts["cnn1d"].manifest.layout)
    open_now, most = set[int](), 0
    x, y = golden_batch(MODELS["cnn1d"], 10, 1, 8)

    class Counting(Engine):
        def open_session(self, file_name: str) -> Any:
            nonlocal most
            session = super().open_session(file_name)
            open_now.add(id(session))
            weakref.finalize(session, open_now.discard, id(session))
            most = max(most, len(open_now))
            return session

    weights = initial_weights(manifest.layout, 3)
    with Counting(artifacts["cnn1d"], mask) as engine:
        node_gradient(engine, weights, x, y, NodeNoise(1, SIGMA, 5, 2, 0))
    assert most == len(noisy_stages(manifest)) == 2
    training = TrainingSettings(estimator="node", batch=8)
    planned = estimator_bytes(training, manifest, mask.n_survivors)
    assert planned > further_session_bytes(manifest, "stage2.onnx", 8) > manifest.live_bytes("stage2.onnx", 8)
    one = dataclasses.replace(manifest, stages=())
    further = further_session_bytes(manifest, "stage2.onnx", 8)
    assert planned - estimator_bytes(training, one, mask.n_survivors) > further


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
    assert found.passes == 2  # in front of the tail, and through it
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
        found = node_gradient(engine, weights, x, y, NodeNoise(6, SIGMA, 5, 2, 0), lambda: called.append(1))
        # Two stages forward, the tail without noise, six passes each for tail and second stage, and their gradients.
        assert (found.passes, len(called)) == (16, 16)
        tail, second = 0.14146, 0.57624
        assert engine.sample_passes == pytest.approx(5 * (1 + 13 * tail + 2 * second), rel=1e-3)


def test_bad_input_is_refused(artifacts: dict[str, Artifact], tiny: Tiny) -> None:
    artifact = artifacts["lenet5"]
    x, y = golden_batch(MODELS["lenet5"], 10, 1, 5)
    noise = NodeNoise(1, SIGMA, 5, 2, 0)
    with Engine(artifact, Mask.dense(artifact.manifest.layout)) as engine:
        huge = np.full(engine.n_survivors, np.float32(3e38))
        with pytest.raises(NonFiniteLossError, match="diverged"):
            node_gradient(engine, huge, x, y, noise)
    with Engine(tiny.artifact, tiny.half) as engine, pytest.raises(ArtifactError, match="no dense tail"):
        node_gradient(engine, engine.weights_feed, tiny.x, tiny.y, noise)
