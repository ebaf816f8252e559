"""sketch: what a round carries plus what stays behind is all there was, and everything is carried in the end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedzo.protocol.directions import Directions
from fedzo.protocol.errors import ConfigError, ProtocolError
from fedzo.protocol.sketch import BASIS_ROUND, GradientSketch


def normal(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


@given(st.integers(1, 300), st.integers(0, 2**32), st.floats(0.0, 0.99), st.data())
def test_nothing_is_lost(size: int, seed: int, decay: float, data: st.DataObject) -> None:
    directions = Directions("hadamard", seed, size, block=1)
    sketch = GradientSketch(directions, decay)
    count = data.draw(st.integers(1, directions.padded))
    first, before = 0, sketch.residual.copy()
    for round_ in range(3):
        gradient = normal(size, seed + round_)
        positions = np.arange(first, first + count)
        carried = directions.combine(BASIS_ROUND, positions, sketch.encode(gradient, positions))
        total = gradient + np.float32(decay) * before
        np.testing.assert_allclose(carried + sketch.residual, total, rtol=1e-4, atol=1e-4)
        # Orthonormal rows: neither part is longer than the whole.
        assert np.linalg.norm(sketch.residual) <= np.linalg.norm(total) * 1.0001 + 1e-4
        first, before = first + count, sketch.residual.copy()


def test_all_rows_carry_a_gradient_whole() -> None:
    directions = Directions("hadamard", 3, 100)
    sketch = GradientSketch(directions, 0.9)
    gradient = normal(100)
    positions = np.arange(128)
    carried = directions.combine(BASIS_ROUND, positions, sketch.encode(gradient, positions))
    np.testing.assert_allclose(carried, gradient, atol=1e-5)
    assert np.abs(sketch.residual).max() < 1e-5


def test_a_constant_gradient_gets_through() -> None:
    """Error feedback: with 8 of 128 rows a round, what arrives has the gradient's direction and nearly its size."""
    directions = Directions("hadamard", 5, 120)
    sketch, gradient = GradientSketch(directions, 0.99), normal(120)
    arrived = np.zeros(120)
    rounds = 1_000
    for round_ in range(rounds):
        positions = np.arange(8 * round_, 8 * round_ + 8)
        arrived += directions.combine(BASIS_ROUND, positions, sketch.encode(gradient, positions))
    mean = arrived / rounds
    cosine = mean @ gradient / np.linalg.norm(mean) / np.linalg.norm(gradient)
    assert cosine > 0.999
    assert 0.9 < np.linalg.norm(mean) / np.linalg.norm(gradient) < 1.0


def test_a_state_is_restored_bit_for_bit() -> None:
    directions = Directions("hadamard", 5, 120)
    sketch, other = GradientSketch(directions, 0.9), GradientSketch(directions, 0.9)
    sketch.encode(normal(120), np.arange(8))
    state = sketch.state()
    assert len(state) == 480
    other.restore(state)
    assert np.array_equal(other.residual, sketch.residual)
    scalars = [s.encode(normal(120, 1), np.arange(8, 16)) for s in (sketch, other)]
    assert scalars[0].tobytes() == scalars[1].tobytes()


def test_a_state_that_cannot_be_is_refused() -> None:
    sketch = GradientSketch(Directions("hadamard", 5, 120), 0.9)
    with pytest.raises(ProtocolError, match="479 bytes"):
        sketch.restore(bytes(479))
    with pytest.raises(ProtocolError, match="not finite"):
        sketch.restore(np.full(120, np.nan, np.float32).tobytes())
    assert not sketch.residual.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_gradient_that_cannot_be_sketched_leaves_the_residual(value: float) -> None:
    sketch = GradientSketch(Directions("hadamard", 5, 120), 0.9)
    sketch.encode(normal(120), np.arange(8))
    before = sketch.state()
    with pytest.raises(ProtocolError, match="too large"):
        sketch.encode(np.full(120, value, np.float32), np.arange(8))
    assert sketch.state() == before


@pytest.mark.parametrize("family", ["gaussian", "rademacher"])
def test_other_families_are_refused(family: str) -> None:
    with pytest.raises(ConfigError, match="orthogonal"):
        GradientSketch(Directions(family, 1, 5), 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match="decay"):
        GradientSketch(Directions("hadamard", 1, 5), decay)


@pytest.mark.parametrize("family", ["gaussian", "rademacher", "hadamard"])
def test_projections_are_inner_products(family: str) -> None:
    directions, values = Directions(family, 9, 77, block=2), normal(77)  # type: ignore[arg-type]
    positions = np.array([0, 3, 40])
    direction = np.empty(77, np.float32)
    wanted = [float(directions.direction(4, p, direction).astype(np.float64) @ values) for p in positions.tolist()]
    np.testing.assert_allclose(directions.project(4, positions, values), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gaussian", "rademacher", "hadamard"])
def test_blocks_have_directions_of_their_own(family: str) -> None:
    found = [Directions(family, 9, 64, block=b).direction(1, 5, np.empty(64, np.float32)) for b in range(4)]  # type: ignore[arg-type]
    for a in range(4):
        for b in range(a):
            assert abs(float(found[a] @ found[b])) < 40  # 64 if they were equal; sd 8
    with pytest.raises(ConfigError, match="block"):
        Directions(family, 9, 64, block=8)  # type: ignore[arg-type]
