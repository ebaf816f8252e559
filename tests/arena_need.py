"""How large an arena a model really needs, by trying: what a plan should know, and what a test may take away."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import golden_batch
from fedzo.protocol.errors import MemoryBudgetError
from fedzo.protocol.pruning.mask import Mask

RESOLUTION_BYTES = 1024


def fits(artifact: Path, micro_batch: int, arena_bytes: int, samples: int, *, scoring: bool) -> bool:
    """Whether the graphs run, dense, on ``samples`` samples, and the known answer is found."""
    loaded = load_artifact(artifact)
    manifest = loaded.manifest
    weights = initial_weights(manifest.layout, manifest.seed)
    x, y = golden_batch(manifest.input_shape, manifest.n_classes, 3, samples)
    settings = {"micro_batch": micro_batch, "arena_bytes": arena_bytes}
    with Engine(loaded, Mask.dense(manifest.layout), layout="portable", **settings) as engine:  # type: ignore[arg-type]
        try:
            engine.check_golden()
            engine.loss(weights, x, y)
            engine.logits(weights, x)
            if scoring:
                engine.shifted_logits(weights, x, np.zeros(manifest.n_units, np.float32))
                engine.moments(weights, x)
        except MemoryBudgetError:
            return False
    return True


def arena_need(artifact: Path, micro_batch: int, samples: int, *, scoring: bool = True) -> int:
    """The smallest arena in which :func:`fits` holds, in bytes."""
    low, high = 0, 1 << 26
    while high - low > RESOLUTION_BYTES:
        middle = (low + high) // 2
        if fits(artifact, micro_batch, middle, samples, scoring=scoring):
            high = middle
        else:
            low = middle
    return high
