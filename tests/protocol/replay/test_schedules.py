"""The learning rate over the updates, as tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedzo.protocol.replay.schedules import SCHEDULES, SMALLEST, Schedule, rate_factor
from fedzo.protocol.settings import TrainingSettings

QUARTERS = 0.5 * (1 + math.cos(math.pi / 4))

# (schedule, rounds, constants, factors of the first updates)
TABLE: list[tuple[Schedule, int, dict[str, float], list[float]]] = [
    ("constant", 4, {}, [1, 1, 1, 1, 1]),
    ("constant", 6, {"warmup": 3}, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]),
    ("cosine", 4, {}, [1, QUARTERS, 0.5, 1 - QUARTERS, SMALLEST]),
    ("cosine", 4, {"final": 0.2}, [1, 0.2 + 0.8 * QUARTERS, 0.6, 0.2 + 0.8 * (1 - QUARTERS), 0.2, 0.2]),
    ("cosine", 6, {"warmup": 2, "final": 0.1}, [1 / 3, 2 / 3, 1, 0.1 + 0.9 * QUARTERS, 0.55]),
    ("linear", 4, {}, [1, 0.75, 0.5, 0.25, SMALLEST, SMALLEST]),
    ("linear", 5, {"warmup": 1, "final": 0.5}, [1 / 2, 1, 0.875, 0.75, 0.625, 0.5, 0.5]),
    ("step", 9, {"decay_every": 2, "decay_factor": 0.5}, [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0625]),
    ("step", 9, {"decay_every": 3, "decay_factor": 0.1, "final": 0.05}, [1, 1, 1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05]),
    ("step", 9, {"warmup": 2, "decay_every": 1, "decay_factor": 0.5}, [1 / 3, 2 / 3, 1, 0.5, 0.25]),
    ("range", 4, {"final": 1e-4}, [1e-4, 1e-3, 1e-2, 1e-1, 1, 1]),
    ("range", 2, {}, [SMALLEST, 1e-3, 1]),
    ("cosine", 0, {}, [1, SMALLEST]),
]


@pytest.mark.parametrize(("schedule", "rounds", "constants", "factors"), TABLE)
def test_factors(schedule: Schedule, rounds: int, constants: dict[str, float], factors: list[float]) -> None:
    found = [rate_factor(schedule, step, rounds, **constants) for step in range(len(factors))]  # type: ignore[arg-type]
    assert found == pytest.approx(factors, rel=1e-12)


def test_every_schedule_is_in_the_table() -> None:
    assert {row[0] for row in TABLE} == set(SCHEDULES)


@given(
    schedule=st.sampled_from(SCHEDULES),
    step=st.integers(0, 2000),
    rounds=st.integers(0, 1000),
    warmup=st.integers(0, 1500),
    decay_every=st.integers(1, 10),
    decay_factor=st.floats(1e-6, 1.0),
    final=st.floats(0.0, 1.0),
)
def test_a_factor_is_never_zero_nor_over_one(
    schedule: Schedule, step: int, rounds: int, warmup: int, decay_every: int, decay_factor: float, final: float
) -> None:
    factor = rate_factor(
        schedule, step, rounds, warmup=warmup, decay_every=decay_every, decay_factor=decay_factor, final=final
    )
    assert SMALLEST <= factor <= 1.0 + 1e-12
    if step >= warmup:
        assert factor >= min(1.0, final) - 1e-12 or schedule == "range"


def test_settings_send_float32_rates() -> None:
    training = TrainingSettings(
        rounds=20, learning_rate=0.3, schedule="step", warmup=2, decay_every=6, decay_factor=0.1, final_rate=0.05
    )
    rates = [training.rate(step) for step in range(20)]
    assert rates == [float(np.float32(rate)) for rate in rates]
    assert rates[2:8] == [float(np.float32(0.3))] * 6
    assert rates[14:] == [float(np.float32(0.3 * 0.05))] * 6
