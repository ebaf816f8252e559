"""The forward-only saliency against automatic differentiation, and that reference against plain differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks import saliency as benchmark
from fedzo.exporter.models.registry import build_forward
from fedzo.exporter.reference import exact_scores, forward
from fedzo.protocol.errors import ConfigError
from fedzo.protocol.layout import initial_weights
from fedzo.protocol.manifest import golden_batch


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
    assert benchmark.spearman(a, a) == pytest.approx(1.0)
    assert benchmark.spearman(a, -a) == pytest.approx(-1.0)
    # Ranks (4, 1.5, 1.5, 3) and (1, 2, 3, 4), minus 2.5: the product is -1.5, the squares are 4.5 and 5.
    assert benchmark.spearman(a, np.arange(4.0)) == pytest.approx(-1.5 / np.sqrt(4.5 * 5.0))
