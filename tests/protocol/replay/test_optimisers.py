"""Optimisers against float64 references, and their bits under other CPU rules."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedzo.protocol.errors import ConfigError
from fedzo.protocol.replay.optimisers import OPTIMISERS, Optimiser, OptimiserConfig, OptimiserName
from tests.protocol.builders import seeded_normals

SIZE = 257


def reference(config: OptimiserConfig, steps: int, rate: float) -> NDArray[np.float64]:
    """The published update rules in float64."""
    weights = seeded_normals(2, 0, SIZE).astype(np.float64)
    first, second = np.zeros(SIZE), np.zeros(SIZE)
    for step in range(1, steps + 1):
        gradient = seeded_normals(2, step, SIZE).astype(np.float64)
        weights -= rate * config.weight_decay * weights
        if config.name == "sgd":
            weights -= rate * gradient
        elif config.name == "momentum":
            first = config.beta1 * first + gradient
            weights -= rate * first
        elif config.name == "sign_momentum":
            first = config.beta1 * first + (1 - config.beta1) * gradient
            weights -= rate * np.sign(first)
        else:
            first = config.beta1 * first + (1 - config.beta1) * gradient
            second = config.beta2 * second + (1 - config.beta2) * gradient**2
            corrected = first / (1 - config.beta1**step)
            weights -= rate * corrected / (np.sqrt(second / (1 - config.beta2**step)) + config.epsilon)
    return weights


def run(optimiser: Optimiser, steps: range, rate: float, scale: float = 1.0) -> NDArray[np.float32]:
    weights = seeded_normals(2, 0, SIZE) * np.float32(scale)
    for step in steps:
        optimiser.step(weights, seeded_normals(2, step, SIZE) * np.float32(scale), np.float32(rate))
    return weights


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_steps_follow_the_published_rules(name: OptimiserName, weight_decay: float) -> None:
    config = OptimiserConfig(name, beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=weight_decay)
    found = run(Optimiser(config, SIZE), range(1, 31), 0.01)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, reference(config, 30, 0.01), rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_gradient_is_only_read(name: OptimiserName) -> None:
    gradient = seeded_normals(1, 0, SIZE)
    before = gradient.copy()
    Optimiser(OptimiserConfig(name), SIZE).step(np.zeros(SIZE, dtype=np.float32), gradient, np.float32(0.1))
    assert np.array_equal(gradient, before)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_zero_gradient_at_the_start_moves_nothing(name: OptimiserName) -> None:
    weights = seeded_normals(1, 0, SIZE)
    before = weights.copy()
    Optimiser(OptimiserConfig(name), SIZE).step(weights, np.zeros(SIZE, dtype=np.float32), np.float32(0.1))
    assert np.array_equal(weights, before)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_restore_continues_bit_for_bit(name: OptimiserName) -> None:
    straight = Optimiser(OptimiserConfig(name), SIZE)
    expected = run(straight, range(1, 21), 0.01)
    half = Optimiser(OptimiserConfig(name), SIZE)
    weights = run(half, range(1, 11), 0.01)
    copy = Optimiser(OptimiserConfig(name), SIZE)
    copy.restore(half.steps, half.state)
    for step in range(11, 21):
        copy.step(weights, seeded_normals(2, step, SIZE), np.float32(0.01))
    assert weights.tobytes() == expected.tobytes()
    assert copy.steps == 20
    for mine, theirs in zip(copy.state, straight.state, strict=True):
        assert mine.tobytes() == theirs.tobytes()
        assert mine is not theirs


def test_restore_refuses_another_optimisers_state() -> None:
    adam = Optimiser(OptimiserConfig("adam"), SIZE)
    with pytest.raises(ConfigError, match="moments"):
        adam.restore(1, adam.state[:1])
    with pytest.raises(ConfigError, match="moments"):
        adam.restore(1, (adam.state[0][:-1], adam.state[1]))


def same_bits_when_flushing(replay: Callable[[], tuple[Optimiser, NDArray[np.float32]]]) -> bool:
    """Whether weights and state are the same with the CPU's denormals on and off."""
    torch = pytest.importorskip("torch", reason="torch sets the CPU's flush-to-zero mode, as 32-bit Arm has it")
    results: list[Any] = []

    def work(flush: bool) -> None:
        # The mode belongs to the thread, so it ends with it.
        assert torch.set_flush_denormal(flush)
        flushes = not (np.full(64, 1e-40, dtype=np.float32) * np.float32(0.5)).any()
        optimiser, weights = replay()
        results.append((flushes, weights.tobytes(), *(part.tobytes() for part in optimiser.state)))

    for flush in (False, True):
        thread = threading.Thread(target=work, args=(flush,))
        thread.start()
        thread.join(60)
    assert [r[0] for r in results] == [False, True]
    return bool(results[0][1:] == results[1][1:])


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("exponent", [-30, -62, -75, -98, -101, -110])
def test_bits_do_not_depend_on_how_a_cpu_treats_denormals(name: OptimiserName, exponent: int) -> None:
    def replay() -> tuple[Optimiser, NDArray[np.float32]]:
        optimiser = Optimiser(OptimiserConfig(name, weight_decay=0.1), SIZE)
        return optimiser, run(optimiser, range(1, 40), 0.01, 2.0**exponent)

    assert same_bits_when_flushing(replay)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_huge_rate_does_not_bring_denormals_back(name: OptimiserName) -> None:
    def replay() -> tuple[Optimiser, NDArray[np.float32]]:
        optimiser = Optimiser(OptimiserConfig(name, beta2=0.9999), SIZE)
        weights = np.zeros(SIZE, dtype=np.float32)
        optimiser.step(weights, seeded_normals(1, 0, SIZE) * np.float32(2.0**60), np.float32(0.0))
        # Adam's first moment decays much faster than the root of its second: their quotient becomes denormal.
        for _ in range(850):
            optimiser.step(weights, np.zeros(SIZE, dtype=np.float32), np.float32(0.0))
        tiny = np.ldexp(np.ones(SIZE, dtype=np.float32), -126 - np.arange(SIZE) % 20).astype(np.float32)
        optimiser.step(weights, tiny, np.float32(2.0**100))
        return optimiser, weights

    assert same_bits_when_flushing(replay)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_nothing_below_the_smallest_magnitude_is_kept(name: OptimiserName) -> None:
    optimiser = Optimiser(OptimiserConfig(name), SIZE)
    weights = run(optimiser, range(1, 10), 1e-3, 2.0**-99)
    for values in (weights, *optimiser.state):
        magnitudes = np.abs(values[values != 0])
        assert (magnitudes >= 2.0**-100).all()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_config_round_trip(name: OptimiserName) -> None:
    config = OptimiserConfig(name, 0.5, 0.25, 1e-3, 2.0)
    assert OptimiserConfig.from_json(config.to_json()) == config


def test_integers_and_floats_give_the_same_json() -> None:
    # The JSON goes into the log's first digest.
    assert OptimiserConfig("adam", 0, 0, 1, 0).to_json() == OptimiserConfig("adam", 0.0, 0.0, 1.0, 0.0).to_json()
    assert all(isinstance(v, (float, str)) for v in OptimiserConfig("adam", 0, 0, 1, 0).to_json().values())


@pytest.mark.parametrize(
    "change",
    [
        {"name": "adamw"},
        {"beta1": 1.0},
        {"beta1": -0.1},
        {"beta2": 1.0},
        {"beta2": math.nan},
        {"epsilon": 0.0},
        {"epsilon": "1e-8"},
        {"weight_decay": -1.0},
        {"weight_decay": math.inf},
        {"beta1": True},
    ],
)
def test_bad_constants_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(OptimiserConfig(), **change)
    with pytest.raises(ConfigError):
        OptimiserConfig.from_json({**OptimiserConfig().to_json(), **change})


@pytest.mark.parametrize("data", [None, [], {}, {"name": "adam"}, {**OptimiserConfig().to_json(), "nesterov": True}])
def test_other_json_is_refused(data: object) -> None:
    with pytest.raises(ConfigError):
        OptimiserConfig.from_json(data)
