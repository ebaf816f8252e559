"""Settings: ranges, and the learning rate's schedule."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedzo.protocol.errors import ConfigError
from fedzo.protocol.server_side.aggregation_rules import AggregationSettings
from fedzo.protocol.settings import RunSettings, SaliencySettings, TrainingSettings

NAN, INFINITY = float("nan"), float("inf")
BAD: list[tuple[type, str, list[Any]]] = [
    (SaliencySettings, "steps", [-1, 1001]),
    (SaliencySettings, "samples", [0, (1 << 16) + 1]),
    (SaliencySettings, "shift", [0.0, -1.0, 10.0, NAN, INFINITY]),
    (SaliencySettings, "draws", [-1, 1025]),
    (SaliencySettings, "inputs", ["", "images"]),
    (TrainingSettings, "rounds", [-1, (1 << 30) + 1]),
    (TrainingSettings, "directions", ["", "normal"]),
    (TrainingSettings, "assignment", ["", "both"]),
    (TrainingSettings, "estimator", ["", "backpropagation"]),
    (TrainingSettings, "k", [0, 60_001]),
    (TrainingSettings, "tail_k", [0, 60_001]),
    (TrainingSettings, "repeats", [0, 65_536]),
    (TrainingSettings, "feedback", [-0.1, 1.0, NAN, INFINITY]),
    (TrainingSettings, "sigma", [0.0, 1e-9, -1e-3, 10.0, NAN, INFINITY]),
    (TrainingSettings, "batch", [0, (1 << 16) + 1]),
    (TrainingSettings, "learning_rate", [0.0, -1.0, 1e3, NAN, INFINITY]),
    (TrainingSettings, "schedule", ["", "exponential"]),
    (TrainingSettings, "warmup", [-1, (1 << 30) + 1]),
    (TrainingSettings, "decay_every", [0, (1 << 30) + 1]),
    (TrainingSettings, "decay_factor", [0.0, -0.5, 1.5, NAN]),
    (TrainingSettings, "final_rate", [-0.1, 1.5, NAN]),
    (TrainingSettings, "k_max", [-1, 63, 60_001]),
    (TrainingSettings, "local_steps", [0, 1_001]),
    (TrainingSettings, "local_rate", [-0.1, 1e3, NAN, INFINITY]),
    (RunSettings, "seed", [-1, 1 << 64]),
    (RunSettings, "sparsity", [-0.1, 1.0, NAN]),
    (RunSettings, "devices", [0, 100_001]),
    (RunSettings, "quorum", [-1, 9]),
    (RunSettings, "deadline_s", [0.0, -1.0, 1e8, NAN, INFINITY]),
    (RunSettings, "enrol_deadline_s", [0.0, 1e8, NAN]),
    (RunSettings, "patience", [0, 1_000_001]),
    (RunSettings, "evaluate_every", [-1, (1 << 30) + 1]),
    (RunSettings, "tune_rounds", [-1, 19, 100_001]),
    (RunSettings, "scalar_limit", [0.0, -1.0, 1e21, NAN, INFINITY]),
]


@pytest.mark.parametrize(("kind", "name", "values"), BAD, ids=[f"{k.__name__}.{n}" for k, n, _ in BAD])
def test_values_out_of_range_are_refused(kind: type, name: str, values: list[Any]) -> None:
    kind()
    for value in values:
        with pytest.raises(ConfigError, match=name.removesuffix("_s").replace("_", " ")):
            kind(**{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local_rate": 0.0}, r"local rate is 0\.0, it must be above 0 for 4 local steps"),
        ({"k": 6}, r"k is 6, it must be a multiple of local steps, 4"),
        ({"k": 6, "estimator": "coordinate"}, "a multiple of local steps"),
        ({"k": 6, "estimator": "node"}, "a multiple of local steps"),
        ({"tail_k": 6, "estimator": "split"}, r"tail k is 6, it must be a multiple of local steps, 4"),
    ],
)
def test_local_steps_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"local_steps": 4, "local_rate": 0.1, "k": 8, "tail_k": 8}
    for estimator in ("stein", "split", "node", "coordinate"):
        TrainingSettings(**{**good, "estimator": estimator})
    with pytest.raises(ConfigError, match=message):
        TrainingSettings(**{**good, **changes})


def test_sketches_and_settings_without_local_steps_need_no_multiple() -> None:
    TrainingSettings(local_steps=3, local_rate=0.1, estimator="local", k=1, tail_k=7)
    TrainingSettings(local_steps=3, local_rate=0.1, estimator="node", k=3, tail_k=7)
    TrainingSettings(local_rate=0.1, k=7)


@pytest.mark.parametrize("estimator", ["coordinate", "local", "local-node"])
@pytest.mark.parametrize("changes", [{"k_max": 128}, {"adapt_sigma": True}])
def test_what_has_no_directions_cannot_adapt_them(estimator: Any, changes: dict[str, Any]) -> None:
    for dealing in ("stein", "split", "node"):
        TrainingSettings(**{**changes, "estimator": dealing})
    with pytest.raises(ConfigError, match=f"{estimator} has no directions") as caught:
        TrainingSettings(**{**changes, "estimator": estimator})
    assert "--k-max" in caught.value.hint


def test_nothing_removed_is_not_filled() -> None:
    RunSettings(fill="init")
    with pytest.raises(ConfigError, match="sparsity of 0") as caught:
        RunSettings(fill="init", sparsity=0.0)
    assert "--fill" in caught.value.hint


@given(sigma=st.floats(1e-6, 9.0))
def test_sigma_is_what_both_sides_multiply_with(sigma: float) -> None:
    kept = TrainingSettings(sigma=sigma).sigma
    assert kept == float(np.float32(sigma))
    assert isinstance(kept, float)


@pytest.mark.parametrize("rounds", [0, 1, 7, 500])
def test_a_constant_rate(rounds: int) -> None:
    training = TrainingSettings(rounds=rounds, learning_rate=0.1, schedule="constant")
    assert [training.rate(step) for step in range(rounds + 2)] == [float(np.float32(0.1))] * (rounds + 2)


@pytest.mark.parametrize("rounds", [0, 1, 2, 7, 500])
def test_a_cosine_rate_falls_and_stays_positive(rounds: int) -> None:
    training = TrainingSettings(rounds=rounds, learning_rate=0.1)
    rates = [training.rate(step) for step in range(rounds + 1)]
    assert rates[0] == float(np.float32(0.1))
    assert all(a > b > 0 for a, b in itertools.pairwise(rates))
    assert all(float(np.float32(rate)) == rate for rate in rates)
    if rounds % 2 == 0 and rounds:
        assert rates[rounds // 2] == pytest.approx(0.05, rel=1e-6)


@pytest.mark.parametrize("rate", [1e-9, 1e-3, 999.0])
@pytest.mark.parametrize("step", [0, 1, 10**6])
def test_rates_are_finite_at_any_step(rate: float, step: int) -> None:
    assert math.isfinite(TrainingSettings(rounds=10, learning_rate=rate).rate(step))


@pytest.mark.parametrize(
    ("changes", "quorum"),
    [
        ({}, 4),
        ({"devices": 2}, 2),
        ({"devices": 40, "participants": 3}, 3),
        ({"devices": 40}, 4),
        ({"devices": 8, "aggregation": AggregationSettings("krum", hostile=2)}, 7),
        ({"devices": 2, "quorum": 1}, 1),
    ],
)
def test_the_quorum_that_nobody_names(changes: dict[str, Any], quorum: int) -> None:
    """Four, all of a fleet that is smaller, and more where the rule needs more."""
    assert RunSettings(training=TrainingSettings(assignment="shared"), **changes).quorum == quorum
