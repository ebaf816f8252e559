"""Several queries in one run: the same losses, chosen by the clock, given up quietly when something is wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedzo.edge_runtime.datasets.data import Batch
from fedzo.edge_runtime.estimation.estimators import Cancelled, SteinEstimator
from fedzo.edge_runtime.inference import query_batches
from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.inference.loss import NonFiniteLossError
from fedzo.edge_runtime.inference.variants import wanted_variants
from fedzo.edge_runtime.planning.memory import TRAINING_GRAPHS, arena_bytes_of, plan
from fedzo.edge_runtime.storage.artifact import Artifact, load_artifact
from fedzo.protocol.artifact.graph_files import GraphFile, GraphVariant
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import Manifest, golden_batch
from fedzo.protocol.errors import ArtifactError, ConfigError, SelfTestError
from fedzo.protocol.perturbation.directions import Directions
from fedzo.protocol.pruning.mask import Mask, threshold

onnx = pytest.importorskip("onnx", reason="fedzo[server] is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fedzo.exporter.artifact import export_artifact

    path = tmp_path_factory.mktemp("batches") / "lenet5"
    export_artifact("lenet5", (1, 20, 20), 10, 0.8, 7, path)
    return path


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Artifact:
    return load_artifact(folder)


@pytest.fixture(scope="module")
def mask(artifact: Artifact) -> Mask:
    layout = artifact.manifest.layout
    return threshold(layout, np.abs(initial_weights(layout, 7)), 0.8)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Batch(*golden_batch((1, 20, 20), 10, 3, 11))


def some_weights(artifact: Artifact, mask: Mask, n: int) -> Any:
    start = initial_weights(artifact.manifest.layout, 7)[mask.survivors()]
    return np.random.default_rng(n).normal(0, 0.02, (n, mask.n_survivors)).astype(np.float32) + start


@pytest.mark.parametrize("layout", ["auto", "portable"])
@pytest.mark.parametrize("micro_batch", [4, 11, 32])
@pytest.mark.parametrize("dense", [True, False])
def test_losses(artifact: Artifact, mask: Mask, batch: Batch, layout: Any, micro_batch: int, dense: bool) -> None:
    mask = Mask.dense(mask.layout) if dense else mask
    settings: dict[str, Any] = {"micro_batch": micro_batch, "layout": layout}
    with Engine(artifact, mask, queries=4, **settings) as four, Engine(artifact, mask, queries=1, **settings) as one:
        for n in (4, 1, 6, 3, 8):
            weights = some_weights(artifact, mask, n)
            found = four.losses(weights, batch.x, batch.y)
            assert found.shape == (n,)
            # The kernels and their order are the same, so the losses are, but that the sum over samples may be cut
            # in other places.
            np.testing.assert_allclose(found, [one.loss(w, batch.x, batch.y) for w in weights], rtol=1e-13)
            np.testing.assert_array_equal(found, four.losses(weights, batch.x, batch.y))
            np.testing.assert_allclose(one.losses(weights, batch.x, batch.y), found, rtol=1e-13)
            four.logits(weights[0], batch.x)  # another graph in between
        assert (four.query_batches.chosen(batch.x, batch.y), one.query_batches.chosen(batch.x, batch.y)) == (4, 1)
        (last,) = some_weights(artifact, mask, 1)
        assert four.loss(last, batch.x, batch.y) == one.loss(last, batch.x, batch.y)


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_scalars(artifact: Artifact, mask: Mask, batch: Batch, n: int, two_sided: bool) -> None:
    estimator = SteinEstimator(Directions("hadamard", 5, mask.n_survivors), 2.0**-8, two_sided)
    weights, positions = some_weights(artifact, mask, 1)[0], np.arange(3, 3 + n)
    with Engine(artifact, mask, queries=4) as four, Engine(artifact, mask, queries=1) as one:
        a, b = (estimator.probe(engine, weights, batch, 2, positions) for engine in (four, one))
    assert a.queries == b.queries == estimator.queries(n)
    np.testing.assert_allclose(a.values, b.values, rtol=1e-6, atol=1e-9)
    assert a.mean_loss == pytest.approx(b.mean_loss, rel=1e-12)


def test_cancelled_between_runs(artifact: Artifact, mask: Mask, batch: Batch) -> None:
    asked: list[int] = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) > 2

    estimator = SteinEstimator(Directions("hadamard", 5, mask.n_survivors), 2.0**-8)
    with Engine(artifact, mask, queries=4) as engine, pytest.raises(Cancelled):
        estimator.probe(engine, some_weights(artifact, mask, 1)[0], batch, 0, np.arange(31), cancelled)
    assert len(asked) == 3


def test_a_loss_that_is_not_finite(artifact: Artifact, mask: Mask, batch: Batch) -> None:
    weights = some_weights(artifact, mask, 3)
    weights[1] *= np.float32(1e30)
    with Engine(artifact, mask, queries=4) as engine, pytest.raises(NonFiniteLossError):
        engine.losses(weights, batch.x, batch.y)
    with Engine(artifact, mask, queries=4) as engine, pytest.raises(ConfigError, match=r"float32\[n, "):
        engine.losses(weights[0], batch.x, batch.y)


def seconds(values: list[float]) -> Callable[..., float]:
    iterator: Iterator[float] = iter(values)
    return lambda *_: next(iterator)


@pytest.mark.parametrize(
    ("times", "chosen"), [((1.0, 4.2), 1), ((1.0, 3.95), 1), ((1.0, 3.8), 4), ((1.0, 1.0), 4), ((0.1, 1.0), 1)]
)
def test_the_quicker_form_is_chosen(
    artifact: Artifact,
    mask: Mask,
    batch: Batch,
    times: tuple[float, float],
    chosen: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Engine(artifact, mask) as engine, caplog.at_level(logging.INFO, logger="fedzo"):
        monkeypatch.setattr(engine.query_batches, "_seconds", seconds(list(times)))
        assert engine.query_batches.chosen(batch.x, batch.y) == chosen
        assert len(engine.query_batches.feeds(batch.x, batch.y)) == chosen
        assert engine.query_batches.chosen(batch.x, batch.y) == chosen  # measured once
        assert caplog.text.count("as one of 4 in a run") == 1


def test_it_is_really_measured(artifact: Artifact, mask: Mask, batch: Batch) -> None:
    with Engine(artifact, mask) as engine:
        assert engine.query_batches.chosen(batch.x, batch.y) in (1, 4)
        least, most = 4 * 3 + 1, 4 * (2 + query_batches.TIMED_RUNS) + query_batches.TIMED_RUNS
        # Single queries of the check, those that are timed, and four in each run of the other graph.
        assert least <= engine.sample_passes / len(batch.x) <= most


def test_a_slow_board_is_not_held_up(
    artifact: Artifact, mask: Mask, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query_batches, "TIMED_S", 0.0)
    with Engine(artifact, mask) as engine:
        assert engine.query_batches.chosen(batch.x, batch.y) in (1, 4)
        # Four single queries and one timed, four in a run and four timed.
        assert engine.sample_passes == len(batch.x) * 13


@pytest.mark.parametrize("queries", ["auto", 4])
def test_weights_in_the_feed_survive_the_measurement(
    artifact: Artifact, mask: Mask, batch: Batch, queries: Any
) -> None:
    (weights,) = some_weights(artifact, mask, 1)
    settings: dict[str, Any] = {"layout": "portable"}  # whose graph reads the feed itself
    with Engine(artifact, mask, queries=queries, **settings) as engine, Engine(artifact, mask, queries=1) as one:
        np.copyto(engine.weights_feed, weights)
        (found,) = engine.losses(engine.weights_feed[np.newaxis], batch.x, batch.y)
        assert found == pytest.approx(one.loss(weights, batch.x, batch.y), rel=1e-6)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("a broken wheel")])
@pytest.mark.parametrize("where", ["open_variant", "loss_sums"])
def test_no_graph_is_used_that_was_not_compared(
    artifact: Artifact, mask: Mask, batch: Batch, error: Exception, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = some_weights(artifact, mask, 4)

    def fails(*_: object) -> Any:
        raise error

    with Engine(artifact, mask) as engine, Engine(artifact, mask, queries=1) as one:
        with monkeypatch.context() as patch:
            patch.setattr(engine, where, fails)
            assert engine.query_batches.chosen(batch.x, batch.y) == 1
        assert engine.query_batches.chosen(batch.x, batch.y) == 1
        np.testing.assert_array_equal(engine.losses(weights, batch.x, batch.y), one.losses(weights, batch.x, batch.y))
    with Engine(artifact, mask, queries=4) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine, where, fails)
            for _ in range(2):
                with pytest.raises(type(error)):
                    engine.losses(weights, batch.x, batch.y)
        engine.losses(weights, batch.x, batch.y)
        assert engine.query_batches.chosen(batch.x, batch.y) == 4  # compared after all


def broken(folder: Path, to: Path, how: str) -> Path:
    """An artifact whose graphs for several queries are absent, wrong or no graphs."""
    shutil.copytree(folder, to)
    manifest = Manifest.decode((to / "manifest.json").read_bytes())
    variants: list[GraphVariant] = []
    for variant in manifest.variants:
        path = to / variant.file.name
        if variant.queries > 1 and how == "absent":
            path.unlink()
        elif variant.queries > 1:
            data = b"no graph"
            if how == "wrong":
                model = onnx.load(str(path))
                for node in model.graph.node:
                    if node.op_type == "Neg":
                        node.op_type = "Exp"
                data = bytes(model.SerializeToString())
            path.write_bytes(data)
            file = GraphFile(variant.file.name, hashlib.sha256(data).digest(), len(data))
            variant = dataclasses.replace(variant, file=file)
        variants.append(variant)
    manifest = dataclasses.replace(manifest, variants=tuple(variants))
    (to / "manifest.json").write_bytes(manifest.encode())
    return to


@pytest.mark.parametrize("how", ["absent", "wrong", "garbage"])
def test_a_graph_that_is_not_right_is_left_out(
    folder: Path, tmp_path: Path, mask: Mask, batch: Batch, how: str
) -> None:
    artifact = load_artifact(broken(folder, tmp_path / "artifact", how))
    with Engine(artifact, mask) as engine:
        assert engine.query_batches.chosen(batch.x, batch.y) == 1
        assert np.isfinite(engine.losses(some_weights(artifact, mask, 2), batch.x, batch.y)).all()
    with pytest.raises((ConfigError, SelfTestError, ArtifactError)), Engine(artifact, mask, queries=4) as engine:
        engine.losses(some_weights(artifact, mask, 2), batch.x, batch.y)


def test_a_number_that_the_artifact_lacks(artifact: Artifact, mask: Mask) -> None:
    with pytest.raises(ConfigError, match="3 queries in one run"):
        Engine(artifact, mask, queries=3)


def test_the_plan_counts_them(artifact: Artifact, mask: Mask, batch: Batch) -> None:
    manifest, n = artifact.manifest, mask.n_survivors
    wanted = wanted_variants(manifest)
    batched = wanted[-1]
    assert batched.queries == 4
    common: dict[str, Any] = {"budget_mib": 500.0, "batch": 32, "micro_batch": 32}
    single = plan(manifest, n, graphs=(*TRAINING_GRAPHS, *(v.file.name for v in wanted[:-1])), **common)
    both = plan(manifest, n, graphs=(*TRAINING_GRAPHS, *(v.file.name for v in wanted)), **common)
    assert both.planned_peak_mib > single.planned_peak_mib
    needed = arena_bytes_of(manifest, (batched.file.name,), n, 32, 1)
    assert needed <= both.arena_bytes
    x, y = np.repeat(batch.x, 3, axis=0)[:32], np.repeat(batch.y, 3)[:32]
    with Engine(artifact, mask, micro_batch=32, arena_bytes=both.arena_bytes, queries=4) as engine:
        assert np.isfinite(engine.losses(some_weights(artifact, mask, 4), x, y)).all()
    small = min(arena_bytes_of(manifest, (v.file.name,), n, 32, 1) for v in manifest.variants if v.queries > 1)
    with Engine(artifact, mask, micro_batch=32, arena_bytes=small - 1) as engine:
        assert engine.query_batches.chosen(x, y) == 1
