"""Rounds in the real world, in virtual time: boards of different speeds, late reports, devices that come late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedzo.protocol.replay.optimisers import OptimiserConfig
from fedzo.protocol.wire.transfers import SnapshotOffer
from fedzo.simulation.process_pool import ProcessPool
from fedzo.simulation.result import SimulationResult
from fedzo.simulation.settings import SimulationSettings
from fedzo.simulation.simulate import simulate
from tests.simulation.conftest import images, run_settings

DATA = images(1, 240)
TEST = images(2, 100)
BOARDS = "rpi-5-8gb:0.6,rpi-zero-2w:0.4"


def run(artifact: Path, *, pool: Any = None, **changes: Any) -> SimulationResult:
    settings = run_settings(training_rounds=8, **changes)
    return simulate(artifact, settings, DATA, TEST, SimulationSettings(boards=BOARDS, seed=6), pool=pool)


def test_a_round_that_asks_for_more_than_it_needs_does_not_wait_for_slow_boards(artifact: Path) -> None:
    patient, quick = run(artifact, training_k=60), run(artifact, training_k=60, close_at=3)
    assert quick.virtual_s_per_round < 0.8 * patient.virtual_s_per_round
    assert quick.devices_agree


@pytest.mark.parametrize("estimator", ["stein", "node"])
def test_buffered_rounds_are_a_function_of_the_settings(artifact: Path, estimator: str) -> None:
    """Whoever computes, the same reports are late by the same number of updates, and residuals get the same back."""
    settings: dict[str, Any] = {"training_estimator": estimator, "training_k": 30, "close_at": 2, "staleness": 3}
    alone = run(artifact, **settings)
    shared = run(artifact, pool=ProcessPool(2), **settings)
    assert alone.devices_agree
    assert (shared.digest, shared.rounds) == (alone.digest, alone.rounds)
    strict = run(artifact, **{**settings, "staleness": 0})
    assert strict.digest != alone.digest
    # With late reports the slow boards count as well.
    assert sum(row.reports for row in alone.rounds) >= 2 * 8


def test_slow_boards_with_fewer_directions_do_not_set_the_pace(artifact: Path) -> None:
    alike, paced = (run(artifact, training_k=64, training_k_min=k_min) for k_min in (0, 2))
    assert paced.virtual_s_per_round < 0.6 * alike.virtual_s_per_round
    assert paced.devices_agree
    assert [row.reports for row in paced.rounds] == [6] * 8  # and all of them count
    assert paced.scalars_per_device_round < alike.scalars_per_device_round
    again = run(artifact, pool=ProcessPool(2), training_k=64, training_k_min=2)
    assert again.digest == paced.digest


def test_devices_that_join_late_get_the_log_or_a_snapshot_and_the_same_weights(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = SimulationSettings(boards="rpi-zero-2w", join_spread_s=1.0, devices=6)
    training = {"rounds": 24, "k": 64, "batch": 2, "optimiser": OptimiserConfig("sgd")}
    many: dict[str, Any] = {"devices": 2, "evaluate_every": 0} | {
        f"training_{name}": value for name, value in training.items()
    }
    settings = [run_settings(**many, snapshots=snapshots) for snapshots in (False, True)]
    found: list[SimulationResult] = []
    offers: list[bytes] = []
    make = SnapshotOffer.encode

    def encode(offer: SnapshotOffer) -> bytes:
        offers.append(make(offer))
        return offers[-1]

    monkeypatch.setattr(SnapshotOffer, "encode", encode)
    for each in settings:
        found.append(simulate(artifact, each, DATA, TEST, world))
        assert bool(offers) == each.snapshots
    for one in found:
        assert one.devices_agree
        assert one.devices_done == 6
    assert found[1].bytes_down < found[0].bytes_down
    assert found[1].digest == found[0].digest
