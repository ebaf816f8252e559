"""Removed weights that keep their initial values: every graph computes what the dense network computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedzo.edge_runtime.estimation.node_gradient import NodeNoise, node_gradient
from fedzo.edge_runtime.estimation.saliency import UnitShiftScorer
from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.inference.suffix import Suffix
from fedzo.edge_runtime.inference.weight_feeds import WeightFeeds, fed_bytes
from fedzo.edge_runtime.planning.memory import TRAINING_GRAPHS, plan
from fedzo.edge_runtime.storage.artifact import Artifact, load_artifact
from fedzo.exporter.artifact import export_artifact
from fedzo.exporter.reference import forward
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import golden_batch
from fedzo.protocol.pruning.mask import Mask, threshold

SHAPE = (1, 20, 20)
BATCH = 9


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("lenet5") / "artifact"
    export_artifact("lenet5", SHAPE, 10, 0.8, 5, folder)
    return load_artifact(folder)


class Case:
    """A mask with ``fill`` init, trained survivors, and the dense network that they stand for."""

    def __init__(self, artifact: Artifact) -> None:
        layout, seed = artifact.manifest.layout, artifact.manifest.seed
        start = initial_weights(layout, seed)
        self.mask = Mask(layout, threshold(layout, np.abs(start), 0.8).kept, "init")
        self.weights = start[self.mask.kept] + np.float32(0.01)
        self.dense = self.mask.filled(self.weights, seed)
        assert np.array_equal(self.dense[~self.mask.kept], start[~self.mask.kept])
        self.x, self.y = golden_batch(SHAPE, 10, 3, BATCH)


@pytest.fixture(scope="module")
def case(artifact: Artifact) -> Case:
    return Case(artifact)


def engines(artifact: Artifact, case: Case, **options: Any) -> tuple[Engine, Engine]:
    return Engine(artifact, case.mask, **options), Engine(artifact, Mask.dense(case.mask.layout), **options)


@pytest.mark.parametrize("layout", ["portable", "blocked"])
def test_losses_are_those_of_the_filled_network(artifact: Artifact, case: Case, layout: str) -> None:
    filled, dense = engines(artifact, case, layout=layout, queries=1, micro_batch=4)
    with filled, dense:
        assert filled.loss(case.weights, case.x, case.y) == dense.loss(case.dense, case.x, case.y)
        logits = filled.logits(case.weights, case.x)
        assert np.array_equal(logits, dense.logits(case.dense, case.x))
        torch_logits = forward("lenet5", case.mask.layout, case.dense, case.x)
        np.testing.assert_allclose(logits, torch_logits, rtol=1e-4, atol=1e-5)
        # Survivors that a caller writes straight into the buffer count too.
        np.copyto(filled.weights_feed, case.weights * np.float32(0.5))
        moved = np.where(case.mask.kept, case.dense * np.float32(0.5), case.dense)
        assert filled.loss(filled.weights_feed, case.x, case.y) == dense.loss(moved, case.x, case.y)
        filled.check_golden()
        assert filled.loss(case.weights, case.x, case.y) == dense.loss(case.dense, case.x, case.y)


@pytest.mark.parametrize("queries", [1, 4])
def test_several_queries_in_a_run(artifact: Artifact, case: Case, queries: int) -> None:
    if queries not in {1, *(v.queries for v in artifact.manifest.variants)}:
        pytest.skip("the exporter found that this network gains nothing from several queries in a run")
    filled, dense = engines(artifact, case, queries=queries)
    rows = np.multiply.outer(np.linspace(0.5, 1.0, 5, dtype=np.float32), case.weights)
    wanted = np.stack([case.mask.filled(row, artifact.manifest.seed) for row in rows])
    with filled, dense:
        np.testing.assert_allclose(filled.losses(rows, case.x, case.y), dense.losses(wanted, case.x, case.y), rtol=1e-6)


def test_halves_of_the_network(artifact: Artifact, case: Case) -> None:
    filled, dense = engines(artifact, case, queries=1)
    with (
        filled,
        dense,
        Suffix.of_cut(filled, case.weights, case.x, case.y) as a,
        Suffix.of_cut(dense, case.dense, case.x, case.y) as b,
    ):
        assert np.array_equal(a.features, b.features)
        assert a.loss(case.weights[a.first :]) == b.loss(case.dense[b.first :])
        np.multiply(case.weights[a.first :], np.float32(0.5), out=a.weights_feed)
        moved = np.where(case.mask.kept, case.dense * np.float32(0.5), case.dense)
        assert a.loss(a.weights_feed) == b.loss(moved[b.first :])


def test_the_gradient_by_node_perturbation_is_that_of_the_survivors(artifact: Artifact, case: Case) -> None:
    filled, dense = engines(artifact, case, queries=1)
    noise = NodeNoise(repeats=3, sigma=np.float32(1e-3), seed=1, round=2, index=0)
    with filled, dense:
        found = node_gradient(filled, case.weights, case.x, case.y, noise)
        wanted = node_gradient(dense, case.dense, case.x, case.y, noise)
    whole = np.zeros(case.mask.layout.size, np.float32)
    whole[wanted.first :] = wanted.values
    assert np.array_equal(found.values, whole[case.mask.kept][found.first :])
    assert np.array_equal(found.losses, wanted.losses)


def test_saliency_is_that_of_the_filled_network(artifact: Artifact, case: Case) -> None:
    filled, dense = engines(artifact, case, queries=1)
    with filled, dense:
        found = UnitShiftScorer(artifact.manifest).score(filled, case.weights, case.x, 0)
        wanted = UnitShiftScorer(artifact.manifest).score(dense, case.dense, case.x, 0)
    assert all(np.array_equal(a, b) for a, b in zip(found.blocks, wanted.blocks, strict=True))


def test_a_mask_that_removes_nothing_needs_no_second_buffer(artifact: Artifact) -> None:
    layout = artifact.manifest.layout
    assert WeightFeeds(Mask(layout, np.ones(layout.size, np.bool_), "init"), 5).filled is None


def test_the_plan_counts_what_is_filled(artifact: Artifact, case: Case) -> None:
    manifest, n, size = artifact.manifest, case.mask.n_survivors, case.mask.layout.size
    feeds = WeightFeeds(case.mask, manifest.seed)
    held = feeds.survivors.nbytes + sum(feeds.inputs[key].nbytes for key in ("w", "index")) + feeds._places.nbytes
    assert held == fed_bytes(n, size)
    plans = [plan(manifest, n, 512.0, graphs=TRAINING_GRAPHS, batch=BATCH, n_fed=fed) for fed in (None, size)]
    # What the known answer took before is free again, so that the feeds may grow by less than the buffers.
    grown = (plans[1].anonymous_mib - plans[0].anonymous_mib) * 2**20
    assert grown >= fed_bytes(n, size) - fed_bytes(n, None)
    assert (plans[1].live_mib - plans[0].live_mib) * 2**20 == pytest.approx(8 * (size - n), abs=1)
    with Engine(artifact, case.mask, micro_batch=plans[1].micro_batch, arena_bytes=plans[1].arena_bytes) as engine:
        engine.loss(case.weights, case.x, case.y)
        engine.logits(case.weights, case.x)


def test_the_head_of_the_log_and_equality_cover_the_fill(case: Case) -> None:
    zero = Mask(case.mask.layout, case.mask.kept)
    assert zero != case.mask
    assert zero.digest == case.mask.digest


def test_the_deployed_model_is_the_filled_network(artifact: Artifact, case: Case, tmp_path: Path) -> None:
    import onnxruntime

    from fedzo.exporter.deploy import deploy

    report = deploy(Path(artifact.source), artifact.manifest, case.mask, case.weights, tmp_path / "model.onnx")
    assert report.nonzero == int(np.count_nonzero(case.dense))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (logits,) = session.run(None, {"x": case.x})
    np.testing.assert_allclose(logits, forward("lenet5", case.mask.layout, case.dense, case.x), rtol=1e-4, atol=1e-5)
