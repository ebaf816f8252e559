"""The forward-only saliency against automatic differentiation, and that reference against plain differences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import saliency as benchmark
from fedzo.edge_runtime.estimation.saliency import UnitShiftScorer
from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.experiments.metrics import overlap, spearman
from fedzo.exporter.artifact import export_artifact
from fedzo.exporter.models.registry import build_forward
from fedzo.exporter.reference import exact_kernel_scores, exact_scores, forward
from fedzo.protocol.artifact.layout import Layout, initial_weights
from fedzo.protocol.artifact.manifest import golden_batch
from fedzo.protocol.errors import ConfigError
from fedzo.protocol.pruning.mask import Mask, threshold
from fedzo.protocol.pruning.saliency import gaussian_inputs, kernel_scores


@pytest.mark.parametrize(("model", "shape"), [("lenet5", (1, 16, 16)), ("resnet8", (1, 8, 8)), ("cnn1d", (2, 26))])
def test_exact_scores_are_squared_derivatives(model: str, shape: tuple[int, ...]) -> None:
    layout = build_forward(model, shape, 3, 0).layout
    weights, (x, _) = initial_weights(layout, 2), golden_batch(shape, 3, 2, 2)
    scores = exact_scores(model, layout, weights, x)
    assert scores.shape == (layout.size,)
    assert (scores >= 0.0).all()
    assert (scores[weights == 0.0] == 0.0).all()
    step = np.float32(2.0**-10)
    largest = [layout.slice_of(k).start + int(scores[layout.slice_of(k)].argmax()) for k in range(3)]
    for index in largest:
        sides = []
        for sign in (1, -1):
            moved = weights.copy()
            moved[index] += sign * step
            sides.append(forward(model, layout, moved, x))
        slope = (sides[0] - sides[1]) / (2.0 * float(step))
        expected = float(weights[index]) ** 2 * float((slope**2).sum(axis=1).mean())
        assert scores[index] == pytest.approx(expected, rel=2e-2), layout.parameters


def test_models_without_a_torch_description_are_refused() -> None:
    layout = build_forward("lenet5", (1, 16, 16), 3, 0).layout
    with pytest.raises(ConfigError, match="there is no torch reference of the model 'my_pkg:model'"):
        forward("my_pkg:model", layout, initial_weights(layout, 0), np.zeros((1, 1, 16, 16), np.float32))


def rows(model: str, samples: int) -> list[dict[str, Any]]:
    setting = benchmark.SETTINGS[model]
    return benchmark.score(model, benchmark.Setting(setting.input_shape, samples, setting.draws), seed=0)


def test_lenet5_saliency_in_228_forward_passes() -> None:
    (row,) = rows("lenet5", 64)
    assert row["passes"] == 228
    assert row["spearman"] >= 0.98
    assert row["iou90"] >= 0.93


@pytest.mark.slow
def test_resnet20_saliency_in_874_forward_passes() -> None:
    plain, calibrated = rows("resnet20", 4)
    assert (plain["passes"], calibrated["passes"]) == (786, 874)
    assert calibrated["spearman"] >= 0.96
    assert calibrated["iou90"] >= 0.72
    assert calibrated["iou90"] > plain["iou90"] + 0.02, "the whole-layer draws do not pay"


def test_rank_correlation_and_overlap() -> None:
    a = np.array([3.0, 1.0, 1.0, 2.0])
    assert spearman(a, a) == pytest.approx(1.0)
    assert spearman(a, -a) == pytest.approx(-1.0)
    # Ranks (4, 1.5, 1.5, 3) and (1, 2, 3, 4), minus 2.5: the product is -1.5, the squares are 4.5 and 5.
    assert spearman(a, np.arange(4.0)) == pytest.approx(-1.5 / np.sqrt(4.5 * 5.0))


@pytest.mark.parametrize("seed", [0, 1])
def test_ntk_sap_s_score_against_its_linearisation(seed: int, tmp_path: Path) -> None:
    """Limits from what a prototype reached (rank correlation 0.954 over all weights, 0.90 to 0.97 within layers)."""
    manifest = export_artifact("lenet5", (1, 32, 32), 10, 0.9, seed, tmp_path / "artifact")
    weights, layout = initial_weights(manifest.layout, seed), manifest.layout
    x = gaussian_inputs(manifest, seed, 0, 0, 16)
    with Engine(load_artifact(tmp_path / "artifact"), Mask.dense(layout), micro_batch=16) as engine:
        found = UnitShiftScorer(manifest).score(engine, weights, x, 0)
    maskable = layout.maskable()
    scores = kernel_scores(manifest, weights, found.sensitivities, found.moments, maskable)
    exact = exact_kernel_scores("lenet5", layout, weights, x)
    assert spearman(scores[maskable], exact[maskable]) >= 0.93
    for unit in manifest.units:
        part = layout.slice_of(layout.position_of(unit.parameter))
        assert spearman(scores[part], exact[part]) >= 0.8, unit.parameter
    wanted, kept = (threshold(layout, s.astype(np.float32), 0.8) for s in (exact, scores))
    assert overlap(wanted, kept) >= 0.5
    traces = exact_scores("lenet5", layout, weights, x)
    assert np.corrcoef(scores[maskable], traces[maskable])[0, 1] < 0.999, "it is not the diagonal score"
    # Without a chain's identity the totals would differ; with it every layer has the same.
    totals = [float(scores[layout.slice_of(layout.position_of(u.parameter))].sum()) for u in manifest.units]
    np.testing.assert_allclose(totals, totals[0], rtol=1e-4)


def test_the_reference_of_ntk_sap_is_a_derivative() -> None:
    model, shape = "lenet5", (1, 16, 16)
    layout = build_forward(model, shape, 3, 0).layout
    layout = Layout(tuple(replace(p, maskable=len(p.shape) > 1) for p in layout.parameters))
    weights, (x, _) = initial_weights(layout, 2), golden_batch(shape, 3, 2, 2)
    scores = exact_kernel_scores(model, layout, weights, x)
    index, step = int(scores.argmax()), 2.0**-8

    def masked_trace(factor: float) -> float:
        """Sum of squared derivatives with respect to weights, each times its mask entry; one of these is moved."""
        moved = weights.copy()
        moved[index] *= np.float32(factor)
        exact = exact_scores(model, layout, moved, x)[layout.maskable()]
        theta = moved.astype(np.float64)[layout.maskable()]
        gradients = exact / np.where(theta == 0.0, 1.0, theta**2)
        place = int(layout.maskable()[:index].sum())
        return float(gradients.sum() + (factor**2 - 1.0) * gradients[place])

    slope = (masked_trace(1.0 + step) - masked_trace(1.0 - step)) / (2.0 * step)
    assert scores[index] == pytest.approx(abs(slope), rel=1e-2)
