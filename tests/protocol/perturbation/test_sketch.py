"""sketch: what a round carries plus what stays behind is all there was, and everything is carried in the end."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedzo.protocol.errors import ConfigError, ProtocolError
from fedzo.protocol.perturbation.ranking import CoordinateRanking
from fedzo.protocol.perturbation.sketch import GradientSketch


def normal(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def carried(ranking: CoordinateRanking, sketch: GradientSketch, gradient: np.ndarray, k: int) -> np.ndarray:
    """What one round carries of a gradient."""
    scalars = sketch.encode(gradient, ranking.chosen(k))
    arrived = ranking.combine(0, np.arange(k), scalars)
    ranking.advance(scalars)
    return arrived


@given(st.integers(1, 300), st.integers(0, 2**32), st.floats(0.0, 0.99), st.floats(0.01, 1.0))
@example(74, 3_595_906_040, 0.0, 0.4)  # a coordinate of 1.5e-5 beside one of 2.2
def test_nothing_is_lost(size: int, seed: int, decay: float, share: float) -> None:
    ranking, sketch = CoordinateRanking(seed, size, 1), GradientSketch(size, decay)
    count = math.ceil(share * size)
    before = sketch.residual.copy()
    for round_ in range(3):
        gradient = normal(size, seed + round_)
        arrived = carried(ranking, sketch, gradient, count)
        total = gradient + np.float32(decay) * before
        np.testing.assert_allclose(arrived + sketch.residual, total, rtol=2e-7)
        # What travels leaves no more behind than rounding takes away, so neither part is longer than the whole.
        # Far below the largest of a row, halves have fewer bits.
        sizes = np.abs(arrived[arrived != 0])
        left = np.abs(sketch.residual[arrived != 0])
        assert (left <= np.maximum(2.0**-10 * sizes, 2.0**-24 * sizes.max(initial=0.0))).all()
        before = sketch.residual.copy()


def test_all_coordinates_carry_a_gradient_whole() -> None:
    sketch, gradient = GradientSketch(100, 0.9), normal(100)
    np.testing.assert_allclose(carried(CoordinateRanking(3, 100, 0), sketch, gradient, 100), gradient, rtol=2.0**-10)
    assert np.abs(sketch.residual).max() < 2.0**-11 * np.abs(gradient).max()


def test_a_constant_gradient_gets_through() -> None:
    """Error feedback: with 8 of 120 coordinates a round, what arrives has the gradient's direction, nearly its size."""
    ranking, sketch, gradient = CoordinateRanking(5, 120, 0), GradientSketch(120, 0.99), normal(120)
    rounds = 1_000
    mean = sum(carried(ranking, sketch, gradient, 8) for _ in range(rounds)) / rounds
    cosine = mean @ gradient / np.linalg.norm(mean) / np.linalg.norm(gradient)
    assert cosine > 0.99
    assert 0.8 < np.linalg.norm(mean) / np.linalg.norm(gradient) < 1.0


def test_ranked_coordinates_carry_more_of_an_uneven_gradient_than_their_share() -> None:
    """5 % of the coordinates, of noisy gradients whose sizes fall like a power law, carry most of what there is."""
    size, k = 2_000, 100
    scale = (1.0 + np.arange(size)) ** -1.0
    ranking, sketch = CoordinateRanking(5, size, 0), GradientSketch(size, 0.95)
    arrived = total = 0.0
    for round_ in range(200):
        gradient = (scale * np.random.default_rng(round_).standard_normal(size)).astype(np.float32)
        before = sketch.residual * np.float32(0.95) + gradient
        part = carried(ranking, sketch, gradient, k)
        if round_ >= 100:
            arrived, total = arrived + float(part @ part), total + float(before @ before)
    assert arrived / total > 0.5


def test_a_state_is_restored_bit_for_bit() -> None:
    sketch, other = GradientSketch(120, 0.9), GradientSketch(120, 0.9)
    sketch.encode(normal(120), np.arange(8))
    state = sketch.state()
    assert len(state) == 480
    other.restore(state)
    assert np.array_equal(other.residual, sketch.residual)
    scalars = [s.encode(normal(120, 1), np.arange(8, 16)) for s in (sketch, other)]
    assert scalars[0].tobytes() == scalars[1].tobytes()


def test_a_state_that_cannot_be_is_refused() -> None:
    sketch = GradientSketch(120, 0.9)
    with pytest.raises(ProtocolError, match="479 bytes"):
        sketch.restore(bytes(479))
    with pytest.raises(ProtocolError, match="not finite"):
        sketch.restore(np.full(120, np.nan, np.float32).tobytes())
    assert not sketch.residual.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_gradient_that_cannot_be_sketched_leaves_the_residual(value: float) -> None:
    sketch = GradientSketch(120, 0.9)
    sketch.encode(np.full(120, 1e30, np.float32), np.arange(8))
    before = sketch.state()
    with pytest.raises(ProtocolError, match="too large"):
        sketch.encode(np.full(120, value, np.float32), np.arange(8))
    assert sketch.state() == before


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match="decay"):
        GradientSketch(5, decay)
