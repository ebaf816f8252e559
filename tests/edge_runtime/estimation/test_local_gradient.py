"""Gradients of local losses: in closed form those of automatic differentiation, by node perturbation but for noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedzo.edge_runtime.estimation.local_gradient import local_gradients, noisy_gradients
from fedzo.edge_runtime.estimation.node_gradient import NodeNoise
from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.inference.loss import NonFiniteLossError
from fedzo.edge_runtime.storage.artifact import Artifact, load_artifact
from fedzo.exporter.artifact import export_artifact
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import golden_batch
from fedzo.protocol.errors import ArtifactError
from fedzo.protocol.pruning.mask import Mask, threshold

from ..conftest import Tiny

SHAPES = {"lenet5": (3, 32, 32), "cnn1d": (9, 40)}
BATCH = 11


@dataclass(frozen=True)
class Case:
    name: str
    artifact: Artifact
    mask: Mask
    weights: NDArray[np.float32]
    x: NDArray[np.float32]
    y: NDArray[np.int64]

    @property
    def n_model(self) -> int:
        """Survivors of the network itself."""
        return int(self.mask.counts()[: len(self.artifact.manifest.model_layout.parameters)].sum())

    def gradient(self) -> tuple[NDArray[np.float32], float]:
        """Of the local losses, by torch, of the survivors; and the network's own loss."""
        layout = self.artifact.manifest.layout
        dense = self.mask.filled(self.weights, self.artifact.manifest.seed)
        p = {
            q.name: torch.tensor(dense[layout.slice_of(k)].reshape(q.shape), requires_grad=True)
            for k, q in enumerate(layout.parameters)
        }
        x, y = torch.from_numpy(self.x), torch.from_numpy(self.y)
        losses = [functional.cross_entropy(logits, y) for logits in self._logits(p, x)]
        total = torch.stack(losses).sum()
        parts = torch.autograd.grad(total, list(p.values()))
        return np.concatenate([g.numpy().ravel() for g in parts])[self.mask.kept], float(losses[-1].detach())

    def _logits(self, p: dict[str, Tensor], x: Tensor) -> list[Tensor]:
        """Logits of every stage's head, front to back; nothing flows back between stages."""

        def head(number: int, h: Tensor) -> Tensor:
            return functional.linear(h.flatten(1), p[f"fedzo.head{number}.weight"], p[f"fedzo.head{number}.bias"])

        if self.name == "lenet5":
            a = functional.avg_pool2d(torch.relu(functional.conv2d(x, p["conv1.weight"], p["conv1.bias"])), 2)
            h = functional.conv2d(a.detach(), p["conv2.weight"], p["conv2.bias"])
            b = functional.avg_pool2d(torch.relu(h), 2).flatten(1)
            c = torch.relu(functional.linear(b.detach(), p["fc1.weight"], p["fc1.bias"]))
            h = torch.relu(functional.linear(c.detach(), p["fc2.weight"], p["fc2.bias"]))
            last = functional.linear(h, p["fc3.weight"], p["fc3.bias"])
            return [head(0, functional.avg_pool2d(a, 2)), head(1, b), head(2, c), last]
        a = functional.avg_pool1d(torch.relu(functional.conv1d(x, p["conv1.weight"], p["conv1.bias"])), 2)
        h = functional.conv1d(a.detach(), p["conv2.weight"], p["conv2.bias"])
        b = functional.avg_pool1d(torch.relu(h), 2)
        h = torch.relu(functional.conv1d(b.detach(), p["conv3.weight"], p["conv3.bias"])).mean(2)
        last = functional.linear(h, p["fc.weight"], p["fc.bias"])
        return [head(0, functional.avg_pool1d(a, 2)), head(1, b), last]


def case(name: str, artifacts: dict[str, Artifact], sparsity: float, fill: str = "zero") -> Case:
    artifact = artifacts[name]
    layout = artifact.manifest.layout
    dense = initial_weights(layout, artifact.manifest.seed)
    mask = threshold(layout, np.abs(dense), sparsity) if sparsity else Mask.dense(layout)
    if fill == "init":
        mask = Mask(layout, mask.kept, "init")
    moved = dense[mask.survivors()] + np.float32(0.02) * np.random.default_rng(0).standard_normal(mask.n_survivors)
    return Case(name, artifact, mask, moved.astype(np.float32), *golden_batch(SHAPES[name], 10, 1, BATCH))


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    found = {}
    for model, shape in SHAPES.items():
        folder = tmp_path_factory.mktemp("local") / model
        export_artifact(model, shape, 10, 0.5, 3, folder, local_heads=True)
        found[model] = load_artifact(folder)
    return found


def close(found: NDArray[np.float32], exact: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-5 * max(1.0, float(np.abs(exact).max())))


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize(("sparsity", "fill"), [(0.0, "zero"), (0.8, "zero"), (0.8, "init")])
@pytest.mark.parametrize("micro_batch", [32, 4])
def test_the_closed_form_is_the_gradient(
    artifacts: dict[str, Artifact], model: str, sparsity: float, fill: str, micro_batch: int
) -> None:
    wanted = case(model, artifacts, sparsity, fill)
    exact, loss = wanted.gradient()
    with Engine(wanted.artifact, wanted.mask, micro_batch=micro_batch) as engine:
        found = local_gradients(engine, wanted.weights, wanted.x, wanted.y)
        assert found.losses.mean() == pytest.approx(engine.loss(wanted.weights, wanted.x, wanted.y), rel=1e-6)
    assert found.losses.mean() == pytest.approx(loss, rel=1e-5)
    close(found.values, exact)


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize(("sparsity", "fill"), [(0.0, "zero"), (0.8, "init")])
def test_noise_gives_the_gradient_but_for_its_variance(
    artifacts: dict[str, Artifact], model: str, sparsity: float, fill: str
) -> None:
    wanted = case(model, artifacts, sparsity, fill)
    exact, loss = wanted.gradient()
    with Engine(wanted.artifact, wanted.mask) as engine:
        noise = NodeNoise(1_500, np.float32(1e-3), 5, 2, 3)
        found = noisy_gradients(engine, wanted.weights, wanted.x, wanted.y, noise)
    assert found.losses.mean() == pytest.approx(loss, rel=1e-5)
    counts = wanted.mask.counts()
    manifest = wanted.artifact.manifest
    for stage in manifest.stages[:-1]:
        part = slice(int(counts[: stage.first_parameter].sum()), int(counts[: stage.end_parameter].sum()))
        a, b = found.values[part], exact[part]
        # Of the convolutions hundreds of outputs have noise.
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.6
        assert a @ b / (b @ b) == pytest.approx(1.0, abs=0.4)
    # The last layer and the heads have no noise at all.
    last = int(counts[: manifest.stages[-1].first_parameter].sum())
    close(found.values[last:], exact[last:])


def test_more_repeats_are_less_noise(artifacts: dict[str, Artifact]) -> None:
    wanted = case("lenet5", artifacts, 0.0)
    exact, _ = wanted.gradient()
    errors = []
    with Engine(wanted.artifact, wanted.mask) as engine:
        for repeats in (8, 128):
            noise = NodeNoise(repeats, np.float32(1e-3), 5, 2, 3)
            found = noisy_gradients(engine, wanted.weights, wanted.x, wanted.y, noise).values
            errors.append(float(np.linalg.norm(found - exact)))
    assert errors[1] / errors[0] == pytest.approx(0.25, rel=0.25)  # the square root of 16


def test_noise_belongs_to_device_round_and_stage(artifacts: dict[str, Artifact]) -> None:
    wanted = case("lenet5", artifacts, 0.8)
    with Engine(wanted.artifact, wanted.mask) as engine:
        values = [
            noisy_gradients(engine, wanted.weights, wanted.x, wanted.y, NodeNoise(2, np.float32(1e-3), 5, r, i)).values
            for r, i in ((1, 1), (1, 1), (1, 2), (2, 1))
        ]
    assert values[0].tobytes() == values[1].tobytes()
    for other in values[2:]:
        assert not np.array_equal(values[0], other)
    signs = np.empty((3, 64), np.float32)
    for place in range(3):  # the tail has none of its own where stages have
        NodeNoise(2, np.float32(1e-3), 5, 1, 1).fill(place, 0, signs[place])
    assert len(np.unique(signs, axis=0)) == 3


@pytest.mark.parametrize("model", SHAPES)
def test_the_cost_is_counted(artifacts: dict[str, Artifact], model: str) -> None:
    """In units of one pass forwards through the network, by multiply-accumulates."""
    wanted = case(model, artifacts, 0.8)
    stages, layout = wanted.artifact.manifest.stages, wanted.artifact.manifest.layout
    total = sum(stage.multiply_accumulates for stage in stages)
    heads = [layout.parameters[s.head.weight].size for s in stages if s.head]
    last = stages[-1].multiply_accumulates
    called: list[int] = []
    with Engine(wanted.artifact, wanted.mask) as engine:
        found = local_gradients(engine, wanted.weights, wanted.x, wanted.y, lambda: called.append(1))
        assert found.passes == len(called) == len(stages) - 1
        assert engine.sample_passes == pytest.approx(BATCH * (2 * total + last + 3 * sum(heads)) / total)
        engine.sample_passes = 0
        called.clear()
        noise = NodeNoise(6, np.float32(1e-3), 5, 2, 0)
        found = noisy_gradients(engine, wanted.weights, wanted.x, wanted.y, noise, lambda: called.append(1))
        assert found.passes == len(called) == 9 * (len(stages) - 1) + 1
        expected = 3 * (total - last) + 2 * last + 8 * sum(heads) + 7 * last
        assert engine.sample_passes == pytest.approx(BATCH * expected / total)


def test_a_network_of_one_or_two_layers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One layer has no noise; two have no head."""
    for layers, n_parameters in (("one_layer", 2), ("two_layers", 4)):
        folder = tmp_path_factory.mktemp("short") / layers
        export_artifact(f"tests.exporter.user_models:{layers}", (6,), 4, 0.0, 3, folder, local_heads=True)
        artifact = load_artifact(folder)
        manifest = artifact.manifest
        assert len(manifest.layout.parameters) == n_parameters
        weights = initial_weights(manifest.layout, 3)
        x, y = golden_batch((6,), 4, 1, BATCH)
        with Engine(artifact, Mask.dense(manifest.layout)) as engine:
            exact = local_gradients(engine, weights, x, y)
            noisy = noisy_gradients(engine, weights, x, y, NodeNoise(3000, np.float32(1e-3), 5, 2, 0))
            assert exact.losses.mean() == pytest.approx(engine.loss(weights, x, y), rel=1e-6)
        np.testing.assert_allclose(exact.losses, noisy.losses, rtol=1e-5)
        a, b = noisy.values, exact.values
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.97


def test_bad_input_is_refused(artifacts: dict[str, Artifact], tiny: Tiny) -> None:
    wanted = case("lenet5", artifacts, 0.0)
    noise = NodeNoise(1, np.float32(1e-3), 5, 2, 0)
    with Engine(wanted.artifact, wanted.mask) as engine:
        huge = np.full(engine.n_survivors, np.float32(3e38))
        with pytest.raises(NonFiniteLossError, match="diverged"):
            local_gradients(engine, huge, wanted.x, wanted.y)
        with pytest.raises(NonFiniteLossError, match="diverged"):
            noisy_gradients(engine, huge, wanted.x, wanted.y, noise)
    with Engine(tiny.artifact, tiny.half) as engine, pytest.raises(ArtifactError, match="no local heads"):
        local_gradients(engine, engine.weights_feed, tiny.x, tiny.y)
