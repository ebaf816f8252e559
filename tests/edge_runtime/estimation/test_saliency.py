"""The unit-shift scorer against finite differences of the float64 reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedzo.edge_runtime.estimation.estimators import Cancelled
from fedzo.edge_runtime.estimation.saliency import UnitShiftScorer
from fedzo.edge_runtime.inference.engine import Engine, NonFiniteLossError
from fedzo.protocol.errors import ConfigError, DataError
from fedzo.protocol.pruning.saliency import diagonal_scores, gaussian_inputs, layer_draw

SHIFT = float(np.float32(1e-2))


@pytest.mark.parametrize("which", ["dense", "half"])
@pytest.mark.parametrize("micro_batch", [4, 64])
def test_sensitivities_and_moments_match_the_reference(tiny: Any, which: str, micro_batch: int) -> None:
    mask = getattr(tiny, which)
    weights = tiny.survivors(mask)
    dense = tiny.expand(mask, weights)
    manifest = tiny.artifact.manifest
    with Engine(tiny.artifact, mask, micro_batch=micro_batch) as engine:
        result = UnitShiftScorer(manifest).score(engine, weights, tiny.x, 0)
        assert engine.sample_passes == result.passes * len(tiny.x)
    clean = tiny.reference.logits(dense, tiny.x)
    expected = np.ones(manifest.n_units)
    for unit in range(5):
        shift = np.zeros(manifest.n_units)
        shift[unit] = SHIFT
        change = tiny.reference.logits(dense, tiny.x, shift) - clean
        expected[unit] = np.mean(np.sum(change**2, axis=1)) / SHIFT**2
    np.testing.assert_allclose(result.sensitivities, expected, rtol=2e-3, atol=1e-7)
    np.testing.assert_allclose(result.moments, tiny.reference.moments(dense, tiny.x), rtol=1e-5)
    assert result.layer_totals is None
    assert result.passes == 2 + 5
    assert len(result.blocks) == 2


def test_scores_are_the_diagonal_of_the_kernel(tiny: Any) -> None:
    """The whole chain: device half, then server half, against per-weight derivatives of the logits."""
    manifest = tiny.artifact.manifest
    x = gaussian_inputs(manifest, 3, 0, 0, 512)
    with Engine(tiny.artifact, tiny.dense, micro_batch=64) as engine:
        result = UnitShiftScorer(manifest).score(engine, tiny.weights, x, 0)
    scores = diagonal_scores(manifest, tiny.weights, result.sensitivities, result.moments, result.layer_totals)
    exact = np.zeros(len(tiny.weights))
    for j in np.flatnonzero(manifest.layout.maskable()):
        moved = tiny.weights.astype(np.float64)
        moved[j] += 1e-5
        change = (tiny.reference.logits(moved, x) - tiny.reference.logits(tiny.weights, x)) / 1e-5
        exact[j] = float(tiny.weights[j]) ** 2 * np.mean(np.sum(change**2, axis=1))
    maskable = manifest.layout.maskable()
    assert np.corrcoef(np.log(scores[maskable]), np.log(exact[maskable]))[0, 1] > 0.99


@pytest.mark.parametrize("which", ["dense", "half"])
def test_layer_totals_match_the_reference(tiny: Any, which: str) -> None:
    mask = getattr(tiny, which)
    weights = tiny.survivors(mask)
    manifest = tiny.artifact.manifest
    with Engine(tiny.artifact, mask, micro_batch=7) as engine:
        result = UnitShiftScorer(manifest, draws=3, seed=5).score(engine, weights, tiny.x, 2)
        untouched = engine.shifted_logits(engine.weights_feed, tiny.x, np.zeros(manifest.n_units, np.float32))
    np.testing.assert_allclose(untouched, tiny.reference.logits(tiny.expand(mask, weights), tiny.x), atol=1e-6)
    clean = tiny.reference.logits(tiny.expand(mask, weights), tiny.x)
    for layer, unit in enumerate(manifest.units):
        part = manifest.layout.slice_of(manifest.layout.position_of(unit.parameter))
        total = 0.0
        for draw in range(3):
            dense = tiny.expand(mask, weights).astype(np.float64)
            dense[part] *= 1.0 + SHIFT * layer_draw(manifest, 5, 2, layer, draw)
            total += float(np.mean(np.sum((tiny.reference.logits(dense, tiny.x) - clean) ** 2, axis=1))) / SHIFT**2 / 3
        assert result.layer_totals is not None
        assert result.layer_totals[layer] == pytest.approx(total, rel=1e-3)
    assert result.passes == 2 + 5 + 3 * 2
    assert len(result.blocks) == 3


def test_scoring_is_deterministic(tiny: Any) -> None:
    results = []
    for _ in range(2):
        with Engine(tiny.artifact, tiny.half, micro_batch=8) as engine:
            scorer = UnitShiftScorer(tiny.artifact.manifest, draws=2, seed=1)
            results.append(scorer.score(engine, tiny.survivors(tiny.half), tiny.x, 3))
    assert [b.tobytes() for b in results[0].blocks] == [b.tobytes() for b in results[1].blocks]


@pytest.mark.parametrize("after", [0, 1, 4])
def test_cancel_stops_before_the_next_pass(tiny: Any, after: int) -> None:
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > after

    with Engine(tiny.artifact, tiny.dense, micro_batch=64) as engine:
        with pytest.raises(Cancelled, match="round 6"):
            UnitShiftScorer(tiny.artifact.manifest).score(engine, tiny.weights, tiny.x, 6, cancelled)
        assert engine.sample_passes == after * len(tiny.x)


def test_overflowing_weights_raise(tiny: Any) -> None:
    weights = np.full_like(tiny.weights, 3e38)
    with Engine(tiny.artifact, tiny.dense) as engine, pytest.raises(NonFiniteLossError):
        UnitShiftScorer(tiny.artifact.manifest).score(engine, weights, tiny.x, 0)


def test_no_samples_are_refused(tiny: Any) -> None:
    with Engine(tiny.artifact, tiny.dense) as engine, pytest.raises(DataError, match="no samples"):
        UnitShiftScorer(tiny.artifact.manifest).score(engine, tiny.weights, tiny.x[:0], 0)


@pytest.mark.parametrize("arguments", [{"shift": 0.0}, {"shift": float("nan")}, {"shift": 11.0}, {"draws": -1}])
def test_settings_out_of_range_are_refused(tiny: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        UnitShiftScorer(tiny.artifact.manifest, **arguments)
