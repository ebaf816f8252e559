"""Scores from unit sensitivities and input moments, and what devices draw for them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.errors import ArtifactError, ProtocolError
from fedzo.protocol.perturbation.quantiles import gaussian_table
from fedzo.protocol.perturbation.streams import Purpose, uint16s
from fedzo.protocol.pruning.saliency import diagonal_scores, gaussian_inputs, layer_draw
from tests.protocol.builders import seeded_normals, small_manifest

MANIFEST = small_manifest()
WEIGHTS = initial_weights(MANIFEST.layout, MANIFEST.seed)
SENSITIVITIES = np.abs(seeded_normals(4, 0, MANIFEST.n_units))
MOMENTS = np.abs(seeded_normals(4, 1, MANIFEST.n_moments))


def test_scores_are_the_product_entry_by_entry() -> None:
    scores = diagonal_scores(MANIFEST, WEIGHTS, SENSITIVITIES, MOMENTS)
    assert scores.dtype == np.float32
    assert scores.shape == (134,)
    expected = np.zeros(134)
    conv = WEIGHTS[:72].reshape(4, 2, 3, 3)
    for out in range(4):
        for channel in range(2):
            for y in range(3):
                for x in range(3):
                    group = out // 2  # outputs 0 and 1 see inputs 0 and 1, outputs 2 and 3 see inputs 2 and 3
                    moment = MOMENTS[group * 18 + channel * 9 + y * 3 + x]
                    flat = ((out * 2 + channel) * 3 + y) * 3 + x
                    expected[flat] = float(conv[out, channel, y, x]) ** 2 * float(SENSITIVITIES[out]) * float(moment)
    for out in range(3):  # the output layer: sensitivity 1
        for column in range(18):
            flat = 80 + out * 18 + column
            expected[flat] = float(WEIGHTS[flat]) ** 2 * float(MOMENTS[36 + column])
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=0)


def test_layer_totals_rescale_each_layer() -> None:
    plain = diagonal_scores(MANIFEST, WEIGHTS, SENSITIVITIES, MOMENTS).astype(np.float64)
    totals = np.array([2.0, 0.5], dtype=np.float32)
    scaled = diagonal_scores(MANIFEST, WEIGHTS, SENSITIVITIES, MOMENTS, totals).astype(np.float64)
    for part, total in ((slice(0, 72), 2.0), (slice(80, 134), 0.5)):
        assert scaled[part].sum() == pytest.approx(total, rel=1e-6)
        np.testing.assert_allclose(scaled[part] / scaled[part].sum(), plain[part] / plain[part].sum(), rtol=1e-6)
    assert not scaled[72:80].any()


def test_layers_can_be_taken_as_they_were_measured() -> None:
    totals = np.array([2.0, 0.5], dtype=np.float32)
    scores = diagonal_scores(MANIFEST, WEIGHTS, np.zeros_like(SENSITIVITIES), MOMENTS, totals, shift=None)
    assert not scores[:72].any()
    assert scores[80:].any()


def test_removed_weights_score_zero_and_small_ones_do_not_underflow() -> None:
    weights = WEIGHTS.copy()
    weights[:10] = 0.0
    weights[10] = 1e-15
    moments = np.full_like(MOMENTS, 1e-10)
    scores = diagonal_scores(MANIFEST, weights, np.full_like(SENSITIVITIES, 1e10), moments)
    assert not scores[:10].any()
    assert scores[10] == pytest.approx(1e-30, rel=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("which", ["sensitivities", "moments", "layer totals"])
def test_hostile_values_are_refused(which: str, bad: float) -> None:
    arrays = {"sensitivities": SENSITIVITIES.copy(), "moments": MOMENTS.copy(), "layer totals": np.ones(2, np.float32)}
    arrays[which][1] = bad
    with pytest.raises(ProtocolError, match=which):
        diagonal_scores(MANIFEST, WEIGHTS, *arrays.values())


def test_wrong_lengths_are_refused() -> None:
    for arguments in (
        (WEIGHTS[:-1], SENSITIVITIES, MOMENTS, None),
        (WEIGHTS, SENSITIVITIES[:-1], MOMENTS, None),
        (WEIGHTS, SENSITIVITIES, MOMENTS[:-1], None),
        (WEIGHTS, SENSITIVITIES, MOMENTS, np.ones(3, dtype=np.float32)),
    ):
        with pytest.raises(ProtocolError, match="were expected"):
            diagonal_scores(MANIFEST, *arguments)


def test_a_maskable_parameter_needs_a_unit_layer() -> None:
    manifest = dataclasses.replace(MANIFEST, units=MANIFEST.units[:1])
    with pytest.raises(ArtifactError, match=r"fc\.weight"):
        diagonal_scores(manifest, WEIGHTS, SENSITIVITIES[:4], MOMENTS[:36])


def test_scores_are_the_exact_diagonal_of_a_linear_layer() -> None:
    # f = V z with z = W x: E||df/dW_ij||^2 = ||V_i||^2 E x_j^2, which unit shifts and moments measure exactly.
    v = seeded_normals(1, 0, 15).reshape(5, 3).astype(np.float64)
    w = seeded_normals(1, 1, 54).reshape(3, 18).astype(np.float64)
    x = seeded_normals(1, 2, 18 * 40).reshape(40, 18).astype(np.float64)
    manifest = dataclasses.replace(
        MANIFEST,
        units=(MANIFEST.units[0], dataclasses.replace(MANIFEST.units[1], is_output=False)),
    )
    shift = 1e-2
    sensitivities = [
        np.mean(np.sum((((x @ w.T + shift * np.eye(3)[i]) - x @ w.T) @ v.T / shift) ** 2, axis=1)) for i in range(3)
    ]
    weights = WEIGHTS.copy()
    weights[80:] = w.ravel()
    scores = diagonal_scores(
        manifest,
        weights,
        np.array([0, 0, 0, 0, *sensitivities], dtype=np.float32),
        np.concatenate([np.zeros(36), np.mean(x**2, axis=0)]).astype(np.float32),
    )
    jacobian = np.einsum("ci,bj->bcij", v, x)
    expected = w**2 * np.mean(np.sum(jacobian**2, axis=1), axis=0)
    np.testing.assert_allclose(scores[80:], expected.ravel(), rtol=1e-5)


def test_gaussian_inputs_read_their_stream() -> None:
    x = gaussian_inputs(MANIFEST, 1, 2, 3, 4)
    assert x.dtype == np.float32
    assert x.shape == (4, 4, 5, 5)
    assert np.array_equal(x.ravel(), gaussian_table()[uint16s(1, Purpose.SALIENCY_INPUT, 2, 3, 400)])
    assert np.array_equal(x[:2], gaussian_inputs(MANIFEST, 1, 2, 3, 2))
    assert not np.array_equal(x, gaussian_inputs(MANIFEST, 1, 2, 4, 4))


def test_layer_draws_are_distinct_signs() -> None:
    draws = [layer_draw(MANIFEST, 1, round_, layer, draw) for round_ in (0, 1) for layer in (0, 1) for draw in range(3)]
    assert [d.size for d in draws] == ([72] * 3 + [54] * 3) * 2
    assert all(set(d.tolist()) == {-1.0, 1.0} for d in draws)
    assert len({d.tobytes()[:200] for d in draws}) == len(draws)


def test_layer_draws_estimate_the_layer_total() -> None:
    # E_r ||J (theta * r)||^2 = sum_j theta_j^2 ||J_j||^2, here with a random Jacobian of 6 outputs.
    jacobian = seeded_normals(8, 0, 6 * 72).reshape(6, 72).astype(np.float64)
    theta = WEIGHTS[:72].astype(np.float64)
    exact = float(np.sum(theta**2 * np.sum(jacobian**2, axis=0)))
    draws = [np.sum((jacobian @ (theta * layer_draw(MANIFEST, 1, 0, 0, k))) ** 2) for k in range(600)]
    assert np.mean(draws) == pytest.approx(exact, rel=0.1)
