"""The contract of every estimator: deterministic, equal to a float64 reference, unbiased, cancellable."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedzo.edge_runtime.datasets.data import Batch
from fedzo.edge_runtime.estimation.estimators import Cancelled, SteinEstimator
from fedzo.edge_runtime.inference.engine import Engine, NonFiniteLossError
from fedzo.protocol.errors import ConfigError
from fedzo.protocol.perturbation.blocks import whole_block
from fedzo.protocol.perturbation.directions import Directions, round_coefficients
from fedzo.protocol.replay.update import estimate_gradient
from fedzo.protocol.wire.messages import UpdateRecord

SIGMA = 2.0**-10
CASES = [
    pytest.param(family, two_sided, id=f"{family}-{'two' if two_sided else 'one'}-sided")
    for family in ("gaussian", "rademacher", "hadamard")
    for two_sided in (False, True)
]


def _positions(n: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.arange(3, 3 + n, dtype=np.int64)


@pytest.mark.parametrize(("family", "two_sided"), CASES)
@pytest.mark.parametrize("micro_batch", [5, 64])
def test_scalars_match_the_reference(tiny: Any, family: Any, two_sided: bool, micro_batch: int) -> None:
    weights = tiny.survivors(tiny.half)
    directions = Directions(family, 9, len(weights))
    batch = Batch(tiny.x, tiny.y)
    with Engine(tiny.artifact, tiny.half, micro_batch=micro_batch) as engine:
        got = SteinEstimator(directions, SIGMA, two_sided).probe(engine, weights, batch, 4, _positions(6))

    def loss(step: float, delta: Any) -> float:
        moved = weights + np.float32(step) * delta
        return float(tiny.reference.loss(tiny.expand(tiny.half, moved), tiny.x, tiny.y))

    expected = []
    for position in _positions(6).tolist():
        delta = directions.direction(4, position, np.empty(len(weights), np.float32))
        low = loss(-SIGMA, delta) if two_sided else loss(0.0, delta)
        expected.append((loss(SIGMA, delta) - low) / (2 * SIGMA if two_sided else SIGMA))
    # The float32 forward pass leaves about 1e-7 in a loss, divided by sigma.
    np.testing.assert_allclose(got.values, expected, atol=4e-4)
    assert got.values.dtype == np.float32
    assert got.queries == (12 if two_sided else 7)
    assert got.mean_loss == pytest.approx(loss(0.0, 0.0), abs=1e-4)


@pytest.mark.parametrize(("family", "two_sided"), CASES)
def test_probe_is_deterministic_and_leaves_the_weights(tiny: Any, family: Any, two_sided: bool) -> None:
    weights = tiny.survivors(tiny.half)
    weights.setflags(write=False)
    batch = Batch(tiny.x, tiny.y)
    results = []
    for _ in range(2):
        estimator = SteinEstimator(Directions(family, 9, len(weights)), SIGMA, two_sided)
        with Engine(tiny.artifact, tiny.half, micro_batch=8) as engine:
            estimator.probe(engine, weights, batch, 1, _positions(2))
            results.append(estimator.probe(engine, weights, batch, 2, _positions(5)))
    assert results[0].values.tobytes() == results[1].values.tobytes()
    assert results[0].mean_loss == results[1].mean_loss


@pytest.mark.parametrize("two_sided", [False, True])
def test_full_hadamard_basis_gives_the_gradient(tiny: Any, two_sided: bool) -> None:
    weights = tiny.survivors(tiny.half)
    directions = Directions("hadamard", 9, len(weights))
    n = directions.n_positions
    with Engine(tiny.artifact, tiny.half, micro_batch=32) as engine:
        scalars = SteinEstimator(directions, SIGMA, two_sided).probe(
            engine, weights, Batch(tiny.x, tiny.y), 0, np.arange(n, dtype=np.int64)
        )
    record = UpdateRecord(
        0, 0, 1.0, ((0, n),), round_coefficients(scalars.values.astype(np.float64) / n), bytes(16), bytes(16)
    )
    estimate = estimate_gradient(whole_block("hadamard", len(weights)), [directions], record)
    gradient = tiny.reference.gradient(tiny.expand(tiny.half, weights), tiny.x, tiny.y)[tiny.half.survivors()]
    # One-sided: the curvature adds O(sigma).
    np.testing.assert_allclose(estimate, gradient, atol=2e-4 if two_sided else 3e-3)


@pytest.mark.parametrize("family", ["gaussian", "rademacher"])
def test_random_directions_are_unbiased(tiny: Any, family: Any) -> None:
    weights = tiny.survivors(tiny.half)
    directions = Directions(family, 21, len(weights))
    n = 4000
    with Engine(tiny.artifact, tiny.half, micro_batch=32) as engine:
        scalars = SteinEstimator(directions, SIGMA, True).probe(
            engine, weights, Batch(tiny.x, tiny.y), 0, np.arange(n, dtype=np.int64)
        )
    estimate = np.zeros(len(weights))
    for position in range(n):
        delta = directions.direction(0, position, np.empty(len(weights), np.float32))
        estimate += float(scalars.values[position]) * delta.astype(np.float64) / n
    gradient = tiny.reference.gradient(tiny.expand(tiny.half, weights), tiny.x, tiny.y)[tiny.half.survivors()]
    # The variance of an entry of the mean is at most (|g|^2 + g_i^2) / n for either family.
    bound = 5.0 * np.sqrt((np.sum(gradient**2) + gradient**2) / n)
    assert (np.abs(estimate - gradient) < bound).all()


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("after", [0, 3])
def test_cancel_stops_before_the_next_query(tiny: Any, two_sided: bool, after: int) -> None:
    weights = tiny.survivors(tiny.half)
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > after

    estimator = SteinEstimator(Directions("hadamard", 9, len(weights)), SIGMA, two_sided)
    batch = Batch(tiny.x, tiny.y)
    with Engine(tiny.artifact, tiny.half) as engine:
        with pytest.raises(Cancelled, match="round 8"):
            estimator.probe(engine, weights, batch, 8, _positions(20), cancelled)
        assert engine.sample_passes == after * len(tiny.x)
        again = estimator.probe(engine, weights, batch, 8, _positions(3))
    assert again.values.shape == (3,)


def test_no_positions_give_no_scalars(tiny: Any) -> None:
    weights = tiny.survivors(tiny.half)
    estimator = SteinEstimator(Directions("hadamard", 9, len(weights)), SIGMA)
    with Engine(tiny.artifact, tiny.half) as engine:
        got = estimator.probe(engine, weights, Batch(tiny.x, tiny.y), 0, _positions(0))
    assert (got.values.size, got.queries) == (0, 1)


@pytest.mark.parametrize("two_sided", [False, True])
def test_diverged_weights_raise(tiny: Any, two_sided: bool) -> None:
    weights = np.full(tiny.half.n_survivors, np.float32(3e38))
    estimator = SteinEstimator(Directions("hadamard", 9, len(weights)), SIGMA, two_sided)
    with Engine(tiny.artifact, tiny.half) as engine, pytest.raises(NonFiniteLossError):
        estimator.probe(engine, weights, Batch(tiny.x, tiny.y), 0, _positions(2))


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf"), 1e-3, 1e-60])
def test_sigma_must_be_a_positive_float32(sigma: float) -> None:
    with pytest.raises(ConfigError, match="sigma"):
        SteinEstimator(Directions("hadamard", 9, 8), sigma)
