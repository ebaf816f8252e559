"""What the server computes itself: SynFlow's scores against torch, and the scores of a device again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedzo.broker_server.server_passes import ServerPasses
from fedzo.broker_server.synflow import check_synflow, path_scores, synflow_mask
from fedzo.edge_runtime.estimation.saliency import UnitShiftScorer
from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.storage.artifact import Artifact, load_artifact
from fedzo.exporter.artifact import export_artifact
from fedzo.exporter.reference import network
from fedzo.protocol.artifact.layout import Layout, initial_weights
from fedzo.protocol.errors import ConfigError
from fedzo.protocol.pruning.mask import Mask, threshold
from fedzo.protocol.pruning.saliency import gaussian_inputs
from fedzo.protocol.server_side.coordinator_events import CheckScores, MakeMask, MaskMade, ScoresChecked
from fedzo.protocol.settings import RunSettings, SaliencySettings
from fedzo.protocol.wire.documents import RunDocument

SHAPES = {"lenet5": (1, 32, 32), "cnn1d": (2, 26)}


@pytest.fixture(scope="module", params=list(SHAPES))
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp(request.param)
    export_artifact(request.param, SHAPES[request.param], 10, 0.9, 3, folder / "artifact")
    return load_artifact(folder / "artifact")


def exact(model: str, layout: Layout, dense: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """``theta dR/dtheta`` of the maskable weights by automatic differentiation, relative to ``R``."""
    parameters = {
        p.name: torch.from_numpy(dense[layout.slice_of(k)].reshape(p.shape)).double().requires_grad_()
        for k, p in enumerate(layout.parameters)
    }
    total = network(model)(parameters, torch.ones((1, *shape), dtype=torch.float64)).sum()
    slopes = torch.autograd.grad(total, list(parameters.values()))
    parts = [(v * g).detach().reshape(-1) for v, g in zip(parameters.values(), slopes, strict=True)]
    return np.asarray((torch.cat(parts) / total.item()).detach().numpy())[layout.maskable()]


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_synflow_scores_are_those_of_automatic_differentiation(artifact: Artifact, sparsity: float) -> None:
    manifest = artifact.manifest
    weights = np.abs(initial_weights(manifest.layout, manifest.seed))
    mask = threshold(manifest.layout, weights, sparsity)
    with Engine(artifact, mask, micro_batch=1) as engine:
        scores = path_scores(engine, weights[mask.kept])
    dense = np.where(mask.kept, weights, np.float32(0.0))
    wanted = exact(manifest.model, manifest.layout, dense, manifest.input_shape)
    np.testing.assert_allclose(scores[manifest.layout.maskable()], wanted, rtol=1e-4, atol=1e-12)


def test_synflow_keeps_every_layer_where_magnitude_nearly_loses_one(artifact: Artifact) -> None:
    layout = artifact.manifest.layout
    settings = RunSettings(sparsity=0.99, saliency=SaliencySettings(method="synflow", steps=10, floor=3))
    mask = synflow_mask(artifact, settings)
    maskable = [k for k, p in enumerate(layout.parameters) if p.maskable]
    assert mask.sparsity == pytest.approx(0.99, abs=1e-4)
    densities = mask.counts()[maskable] / [layout.parameters[k].size for k in maskable]
    assert mask.counts()[maskable].min() >= 3
    by_size = threshold(layout, np.abs(initial_weights(layout, artifact.manifest.seed)), 0.99)
    assert densities.min() > (by_size.counts()[maskable] / [layout.parameters[k].size for k in maskable]).min()
    once = synflow_mask(artifact, dataclasses.replace(settings, saliency=SaliencySettings(method="synflow", steps=1)))
    assert mask != once, "survivors are scored again"


def test_synflow_is_refused_where_it_is_not_defined(tmp_path: Path) -> None:
    export_artifact("resnet8", (1, 8, 8), 10, 0.9, 0, tmp_path / "artifact")
    normalised, synflow = load_artifact(tmp_path / "artifact"), SaliencySettings(method="synflow")
    for ask in (synflow_mask, check_synflow):
        with pytest.raises(ConfigError, match="synflow is not defined for resnet8: its logits are not linear in conv1"):
            ask(normalised, RunSettings(saliency=synflow))
    check_synflow(normalised, RunSettings(saliency=synflow, sparsity=0.0))
    check_synflow(normalised, RunSettings())


def test_synflow_can_be_asked_for_where_it_is_defined(artifact: Artifact) -> None:
    check_synflow(artifact, RunSettings(saliency=SaliencySettings(method="synflow")))


def passes(artifact: Artifact, saliency: SaliencySettings) -> ServerPasses:
    settings = RunSettings(sparsity=0.9, saliency=saliency)
    return ServerPasses(artifact, RunDocument("run-1", artifact.digest.hex(), 1, settings))


def test_the_mask_comes_encoded(artifact: Artifact) -> None:
    saliency = SaliencySettings(method="synflow", steps=2)
    made = passes(artifact, saliency).answer(MakeMask())
    assert isinstance(made, MaskMade)
    wanted = synflow_mask(artifact, RunSettings(sparsity=0.9, saliency=saliency))
    assert Mask.decode(made.encoded, artifact.manifest.layout) == wanted


@pytest.mark.parametrize(("factor", "low", "high"), [(1.0, 0.0, 1e-4), (1.05, 0.049, 0.051)])
def test_scores_of_a_board_are_compared_with_the_server_s_own(
    artifact: Artifact, factor: float, low: float, high: float
) -> None:
    """Another micro-batch and number of threads is another order of sums, as on another machine."""
    saliency, manifest = SaliencySettings(samples=8, draws=1), artifact.manifest
    mask, weights = Mask.dense(manifest.layout), initial_weights(manifest.layout, manifest.seed)
    with Engine(artifact, mask, micro_batch=3, threads=2) as engine:
        scorer = UnitShiftScorer(manifest, draws=1, seed=1)
        found = scorer.score(engine, weights, gaussian_inputs(manifest, 1, 4, 2, 8), 4)
    blocks = tuple(block * np.float32(factor) for block in found.blocks)
    checked = passes(artifact, saliency).answer(CheckScores(4, "b", 2, mask, weights, blocks))
    assert isinstance(checked, ScoresChecked)
    assert (checked.round, checked.device) == (4, "b")
    assert low <= checked.difference <= high
    assert (checked.difference > saliency.check_limit) == (factor != 1.0)
