"""Hostile devices: what each attack reports, and that a pool of them changes nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedzo.experiments.attackers import ATTACKS, HostilePool, Rows
from fedzo.experiments.lab import exported_folder
from fedzo.protocol.perturbation.streams import Purpose, uint64s
from fedzo.protocol.settings import RunSettings, TrainingSettings
from fedzo.simulation.settings import SimulationSettings
from fedzo.simulation.simulate import simulate

HONEST = np.array([[1.0, -3.0, 2.0], [2.0, -1.0, -1.0], [3.0, -2.0, 0.5]])
OWN = np.array([[1.5, -2.0, 1.0], [2.5, -1.5, 0.0]])
CHANCE = np.array([[0.0, 0.25, 0.999], [0.5, 0.75, 0.1]])


def made(name: str) -> Rows:
    return ATTACKS[name](HONEST, OWN, CHANCE)


def test_what_attacks_report() -> None:
    assert made("sign flip").tolist() == (-4.0 * OWN).tolist()
    assert made("inner product").tolist() == [(-0.5 * HONEST.mean(axis=0)).tolist()] * 2
    moved = HONEST.mean(axis=0) - made("a little is enough")[0]
    # 5 devices, 2 hostile: 1 of 3 must be won over, so two thirds of the honest are nearer to the mean.
    np.testing.assert_allclose(moved, 0.4307 * np.sign(HONEST.mean(axis=0)) * HONEST.std(axis=0), rtol=1e-3)
    trimmed = made("trim attack")
    assert ((trimmed[:, 0] >= 0.5) & (trimmed[:, 0] <= 1.0)).all(), "the mean is above 0: below the smallest"
    assert ((trimmed[:, 1] >= -1.0) & (trimmed[:, 1] <= -0.5)).all(), "the mean is below 0: above the largest"
    assert ((trimmed[:, 2] >= -2.0) & (trimmed[:, 2] <= -1.0)).all()


def test_noise_is_large_and_normal() -> None:
    shape = (4, 5000)
    chance = (uint64s(1, Purpose.CHANCE, 0, 0, 20_000) >> np.uint64(11)).astype(np.float64).reshape(shape) * 2.0**-53
    noise = ATTACKS["large noise"](np.full((3, 5000), 2.0), np.zeros(shape), chance)
    assert noise.std() == pytest.approx(60.0, rel=0.03)
    assert abs(float(noise.mean())) < 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with exported_folder("lenet5", (1, 16, 16), 3, 1) as path:
        target = tmp_path_factory.mktemp("attacks") / "artifact"
        path.rename(target)
    return target


def test_only_hostile_devices_lie(folder: Path) -> None:
    """Weights change with them, and are the same again with the same seed; passes are those of honest devices."""
    generator = np.random.default_rng(3)
    data = generator.normal(size=(60, 1, 16, 16)).astype(np.float32), np.arange(60, dtype=np.int64) % 3
    training = TrainingSettings(rounds=3, k=4, batch=4, assignment="shared")
    settings = RunSettings(sparsity=0.0, training=training, devices=5, quorum=5)
    found, passes = {}, set()
    for name, pool in {
        "honest": HostilePool(None, {0, 1}, 7),
        "nobody": HostilePool(ATTACKS["sign flip"], (), 7),
        "flip": HostilePool(ATTACKS["sign flip"], {0, 1}, 7),
        "noise": HostilePool(ATTACKS["large noise"], {0, 1}, 7),
        "noise again": HostilePool(ATTACKS["large noise"], {0, 1}, 7),
        "other noise": HostilePool(ATTACKS["large noise"], {0, 1}, 8),
    }.items():
        result = simulate(folder, settings, data, None, SimulationSettings(), pool=pool)
        found[name] = result.digest
        assert result.devices_agree
        passes.add(result.sample_forwards)
    plain = simulate(folder, settings, data, None, SimulationSettings())
    assert found["honest"] == found["nobody"] == plain.digest
    assert passes == {plain.sample_forwards}
    assert found["noise"] == found["noise again"]
    assert len({found[name] for name in ("honest", "flip", "noise", "other noise")}) == 4
