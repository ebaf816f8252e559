"""A simulation that looks for its learning rate first."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fedzo.protocol.errors import ConfigError
from fedzo.protocol.server_side.rate_finder import LEAST_UPDATES, RISE, RangeTest, range_test_settings, with_found_rate
from fedzo.protocol.settings import RunSettings
from fedzo.simulation.process_pool import ProcessPool
from fedzo.simulation.simulate import simulate
from tests.simulation.conftest import images, run_settings


def test_the_found_rate_trains_from_the_initial_weights(artifact: Path) -> None:
    settings = run_settings(tune_rounds=40, sparsity=0.0, training_k=48)
    found = simulate(artifact, settings, images(1, 200))
    assert 1e-4 < found.learning_rate < 1.0
    assert [row.round for row in found.rounds] == [1, 2, 3, 4]
    assert found.devices_agree
    training = dataclasses.replace(settings.training, learning_rate=found.learning_rate)
    plain = simulate(artifact, dataclasses.replace(settings, training=training, tune_rounds=0), images(1, 200))
    assert plain.digest == found.digest
    tried = simulate(artifact, range_test_settings(settings), images(1, 200))
    assert plain.tuning_sample_forwards == 0.0
    assert found.tuning_sample_forwards == tried.sample_forwards > found.sample_forwards
    again = simulate(artifact, settings, images(1, 200), pool=ProcessPool(2))
    assert (again.learning_rate, again.digest) == (found.learning_rate, found.digest)


def tried(losses: list[float]) -> RangeTest:
    test = RangeTest()
    for number, loss in enumerate(losses):
        if test.is_over:
            break
        test.add(10.0 ** (number / 10 - 5), loss)
    return test


def test_the_rate_lies_where_the_loss_has_made_half_of_its_way() -> None:
    test = tried([2.0] * 20 + [2.0 - 0.1 * i for i in range(16)] + [0.5] * 10 + [9.0] * 9)
    assert test.is_over
    assert len(test.losses) < 50  # it ends soon after the rise
    assert test.losses[-1] > RISE * min(test.losses)
    # Half of the way down is near update 28; the average lags behind by some updates.
    assert 10 ** (27 / 10 - 5) < test.rate() < 10 ** (34 / 10 - 5)


@pytest.mark.parametrize(
    "losses",
    [[], [2.0], [2.0] * 40, [2.0] * 9 + [30.0] * 20, [2.0 + 0.1 * i for i in range(30)], [2.0, 1.0] + [9.0] * 20],
)
def test_losses_that_never_fall_give_no_rate(losses: list[float]) -> None:
    with pytest.raises(ConfigError, match="no rate has made the loss fall"):
        tried(losses).rate()


def test_a_range_test_neither_evaluates_nor_averages() -> None:
    settings = RunSettings(tune_rounds=40)
    settings = dataclasses.replace(
        settings,
        training=dataclasses.replace(
            settings.training,
            warmup=5,
            k_max=100,
            optimiser=dataclasses.replace(settings.training.optimiser, ema=0.9, front_rate=0.5),
        ),
    )
    first = range_test_settings(settings)
    assert (first.training.rounds, first.evaluate_every, first.tune_rounds) == (40, 0, 0)
    assert (first.training.warmup, first.training.k_max, first.training.optimiser.ema) == (0, 0, 0.0)
    assert first.training.optimiser.front_rate == 0.5
    rates = [first.training.rate(step) for step in range(41)]
    assert rates[0] == pytest.approx(1e-5, rel=1e-5)
    assert rates[-1] == pytest.approx(10.0, rel=1e-5)
    test = tried([2.0] * (LEAST_UPDATES + 2) + [1.0] * 20)
    found = with_found_rate(settings, test)
    assert found.tune_rounds == 0
    assert found == dataclasses.replace(
        settings, tune_rounds=0, training=dataclasses.replace(settings.training, learning_rate=test.rate())
    )
