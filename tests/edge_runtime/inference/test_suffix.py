"""Stored features: probes of the later layers give the losses of whole passes at their share of the price."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.inference.loss import NonFiniteLossError
from fedzo.edge_runtime.inference.suffix import Suffix
from fedzo.edge_runtime.planning.memory import arena_bytes_of
from fedzo.edge_runtime.storage.artifact import Artifact, load_artifact
from fedzo.exporter.artifact import export_artifact
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import CUT_GRAPHS, golden_batch
from fedzo.protocol.errors import ArtifactError, DataError, MemoryBudgetError
from fedzo.protocol.pruning.mask import Mask, threshold

from ..conftest import Tiny

MODELS = {"lenet5": (1, 32, 32), "resnet8": (3, 16, 16)}


@dataclass(frozen=True)
class Case:
    artifact: Artifact
    mask: Mask
    weights: NDArray[np.float32]
    x: NDArray[np.float32]
    y: NDArray[np.int64]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, float], Artifact]:
    found = {}
    for model, shape in MODELS.items():
        for sparsity in (0.0, 0.9):
            folder = tmp_path_factory.mktemp("suffix") / f"{model}-{sparsity}"
            export_artifact(model, shape, 10, sparsity, 3, folder)
            found[model, sparsity] = load_artifact(folder)
    return found


@pytest.fixture(params=[(model, sparsity) for model in MODELS for sparsity in (0.0, 0.9)], ids=str)
def case(request: pytest.FixtureRequest, artifacts: dict[tuple[str, float], Artifact]) -> Case:
    model, sparsity = request.param
    artifact = artifacts[model, sparsity]
    layout = artifact.manifest.layout
    dense = initial_weights(layout, 3)
    mask = threshold(layout, np.abs(dense), sparsity) if sparsity else Mask.dense(layout)
    return Case(artifact, mask, dense[mask.survivors()], *golden_batch(MODELS[model], 10, 1, 11))


@pytest.mark.parametrize("micro_batch", [4, 32])
def test_losses_equal_those_of_whole_passes_bit_for_bit(case: Case, micro_batch: int) -> None:
    with Engine(case.artifact, case.mask, micro_batch=micro_batch, layout="portable") as engine:
        rng = np.random.default_rng(0)
        with Suffix.of_cut(engine, case.weights, case.x, case.y) as suffix:
            moved = [case.weights.copy() for _ in range(3)]
            for weights in moved[1:]:
                weights[suffix.first :] += 1e-2 * rng.standard_normal(len(weights) - suffix.first).astype(np.float32)
            losses = [suffix.loss(weights[suffix.first :]) for weights in moved]
            np.copyto(suffix.weights_feed, moved[1][suffix.first :])
            assert suffix.loss(suffix.weights_feed) == losses[1]
        assert losses == [engine.loss(weights, case.x, case.y) for weights in moved]
        assert len(set(losses)) == 3


def test_the_cut_counts_what_passes_cost(case: Case) -> None:
    cut = case.artifact.manifest.cut
    assert cut is not None
    with Engine(case.artifact, case.mask) as engine, Suffix.of_cut(engine, case.weights, case.x, case.y) as suffix:
        assert suffix.first == int(case.mask.counts()[: cut.first_parameter].sum())
        for _ in range(4):
            suffix.loss(case.weights[suffix.first :])
        assert engine.sample_passes == pytest.approx(11 * (1 + 3 * cut.suffix_share))


def test_a_query_from_features_is_cheaper(artifacts: dict[tuple[str, float], Artifact]) -> None:
    artifact = artifacts["resnet8", 0.0]
    weights = initial_weights(artifact.manifest.layout, 3)
    x, y = golden_batch(MODELS["resnet8"], 10, 1, 32)
    with Engine(artifact, Mask.dense(artifact.manifest.layout), layout="portable") as engine:

        def fastest(query: object) -> float:
            assert callable(query)
            times = []
            for _ in range(15):
                before = time.thread_time()
                query()
                times.append(time.thread_time() - before)
            return min(times)

        whole = fastest(lambda: engine.loss(weights, x, y))
        with Suffix.of_cut(engine, weights, x, y) as suffix:
            part = fastest(lambda: suffix.loss(weights[suffix.first :]))
    assert part < 0.7 * whole  # by multiplications: 0.29


def test_the_limit_of_the_plan_is_enough_and_holds(case: Case) -> None:
    manifest = case.artifact.manifest
    limit = arena_bytes_of(manifest, CUT_GRAPHS, case.mask.n_survivors, 8, 1)
    engine = Engine(case.artifact, case.mask, micro_batch=8, arena_bytes=limit)
    with engine, Suffix.of_cut(engine, case.weights, case.x, case.y) as suffix:
        assert np.isfinite(suffix.loss(case.weights[suffix.first :]))
    with (
        Engine(case.artifact, case.mask, micro_batch=8, arena_bytes=limit // 8) as engine,
        pytest.raises(MemoryBudgetError),
    ):
        Suffix.of_cut(engine, case.weights, case.x, case.y)
    with Engine(case.artifact, case.mask, micro_batch=8, arena_bytes=limit) as engine:
        assert np.isfinite(Suffix.of_cut(engine, case.weights, case.x, case.y).loss(case.weights[suffix.first :]))


def test_bad_input_is_refused(case: Case, tiny: Tiny) -> None:
    with Engine(case.artifact, case.mask) as engine:
        with pytest.raises(DataError, match="shape"):
            Suffix.of_cut(engine, case.weights, case.x[:, :, :4], case.y)
        with pytest.raises(DataError, match="labels"):
            Suffix.of_cut(engine, case.weights, case.x, case.y[:3])
        with (
            Suffix.of_cut(engine, case.weights, case.x, case.y) as suffix,
            pytest.raises(NonFiniteLossError, match="diverged"),
        ):
            suffix.loss(np.full_like(suffix.weights_feed, np.float32(3e38)))
    with Engine(tiny.artifact, tiny.half) as engine, pytest.raises(ArtifactError, match="no graphs that start"):
        Suffix.of_cut(engine, engine.weights_feed, tiny.x, tiny.y)
