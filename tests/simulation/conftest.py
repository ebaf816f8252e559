"""A small network and four kinds of noisy patterns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedzo.protocol.settings import RunSettings, SaliencySettings, TrainingSettings

SIDE = 16
CLASSES = 4


def images(seed: int, n: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    patterns = np.random.default_rng(99).normal(0.0, 1.0, (CLASSES, 1, SIDE, SIDE))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n)
    return (patterns[labels] + rng.normal(0.0, 0.5, (n, 1, SIDE, SIDE))).astype(np.float32), labels.astype(np.int64)


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LeNet-5 for 16x16 images, pruned to a tenth."""
    from fedzo.exporter.artifact import export_artifact

    folder = tmp_path_factory.mktemp("artifact") / "lenet"
    export_artifact("lenet5", (1, SIDE, SIDE), CLASSES, 0.9, 1, folder)
    return folder


def run_settings(devices: int = 6, **changes: Any) -> RunSettings:
    """Four rounds; ``training_`` in front of a name changes the training."""
    training = {name[9:]: value for name, value in changes.items() if name.startswith("training_")}
    rest = {name: value for name, value in changes.items() if not name.startswith("training_")}
    usual: dict[str, Any] = {"rounds": 4, "k": 6, "tail_k": 32, "repeats": 2, "batch": 8, **training}
    whole: dict[str, Any] = {"sparsity": 0.9, "quorum": 1, "evaluate_every": 2, "deadline_s": 30.0, **rest}
    saliency = SaliencySettings(samples=4)
    return RunSettings(devices=devices, training=TrainingSettings(**usual), saliency=saliency, **whole)
