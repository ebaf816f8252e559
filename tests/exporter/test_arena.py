"""The arena that is replayed, by hand, and beside that of onnxruntime for networks that leave it in pieces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.inference.ort import arena_limit_holds
from fedzo.edge_runtime.planning.memory import SCORING_GRAPHS, arena_bytes_of, plan
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.exporter.arena import MAX_DEAD_BYTES, Request, arena_bytes
from fedzo.exporter.artifact import export_artifact
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import golden_batch
from fedzo.protocol.errors import MemoryBudgetError
from fedzo.protocol.pruning.mask import Mask, threshold

HERE = "tests.exporter.growing_models"
KIB = 1024


def requests(text: str) -> list[Request]:
    """``a4`` asks for 4 KiB, ``-a`` gives them back."""
    return [(w[1:], None) if w[0] == "-" else (w[0], (int(w[1:]) * KIB, 0)) for w in text.split()]


@pytest.mark.parametrize(
    ("text", "expected_kib"),
    [
        ("a4 b4 -a c4 -b -c", 8),  # what is given back is taken again
        ("a4 -a b8 -b", 12),  # a larger one needs a region of its own
        ("a4 b4 -a -b c8 -c", 16),  # regions never merge
        ("a8 -a b4 c4 -b -c", 8),  # half of a piece is split off
        ("a8 -a b5 c3 -b -c", 11),  # more than half takes all of it
        ("a8 -a b4 c4 -b -c d8 -d", 8),  # the halves merge again
        ("a8 b16 -a -b c8 d8 -c -d", 24),  # the smallest that fits
        ("a4", 4),  # an output goes back at the end, so the next run finds it
    ],
)
def test_hand_counts(text: str, expected_kib: int) -> None:
    assert arena_bytes(requests(text), 1) == expected_kib * KIB, text


def test_sizes_grow_with_the_batch_and_to_the_alignment() -> None:
    assert arena_bytes([("a", (100, 1000)), ("a", None)], 3) == 3328
    assert arena_bytes([("a", (0, 0))], 1) == 0


def test_much_that_would_be_dead_is_split_off() -> None:
    large = MAX_DEAD_BYTES + 3 * 256
    steps: list[Request] = [("a", (2 * large - 256, 0)), ("a", None), ("b", (large, 0)), ("c", (large - 256, 0))]
    assert arena_bytes(steps, 1) == 2 * large - 256


@pytest.mark.skipif(not arena_limit_holds(), reason="this onnxruntime keeps its first arena, so no limit can be tried")
@pytest.mark.parametrize(
    ("function", "shape", "least"),
    [
        ("widening", (3, 16, 16), 0.85),
        ("inverted", (3, 16, 16), 0.85),
        ("over_time", (3, 128), 0.75),
        ("hard_swish", (3, 24, 24), 0.85),
        ("recurrent", (3, 100), 0.7),
        ("chosen", (3, 16, 16), 0.8),
    ],
)
def test_networks_run_within_their_plan_and_not_within_much_less(
    function: str, shape: tuple[int, ...], least: float, tmp_path: Path
) -> None:
    manifest = export_artifact(f"{HERE}:{function}", shape, 10, 0.8, 7, tmp_path / "a")
    artifact, layout = load_artifact(tmp_path / "a"), manifest.layout
    dense = initial_weights(layout, 7)
    shift = np.zeros(manifest.n_units, np.float32)
    for mask in (Mask.dense(layout), threshold(layout, np.abs(dense), 0.8)):
        weights = dense[mask.kept]
        for batch in (5, 32):
            x, y = golden_batch(shape, 10, 1, batch)
            calls: dict[str, Callable[[Engine], object]] = {
                "probe.onnx": lambda e, w=weights, x=x, y=y: e.loss(w, x, y),  # type: ignore[misc]
                "saliency.onnx": lambda e, w=weights, x=x: e.shifted_logits(w, x, shift),  # type: ignore[misc]
            }
            for name, call in calls.items():
                limit = arena_bytes_of(manifest, (name,), mask.n_survivors, batch, 1)
                with Engine(artifact, mask, micro_batch=batch, arena_bytes=limit, layout="portable") as engine:
                    for _ in range(3):
                        call(engine)
                if batch == 32:
                    less = int(least * manifest.live_bytes(name, batch))
                    tight = Engine(artifact, mask, micro_batch=batch, arena_bytes=less, layout="portable")
                    with tight, pytest.raises(MemoryBudgetError, match="Available memory") as refused:
                        call(tight)
                    assert "does not raise this limit" in refused.value.hint


def test_constants_are_counted_by_their_bytes(tmp_path: Path) -> None:
    manifest = export_artifact(f"{HERE}:frozen", (1, 28, 28), 10, 0.8, 7, tmp_path / "a")
    size = 4 * (784 * 1000 + 1000)
    found = [manifest.memory_of(graph.name).constants for graph in manifest.graphs if graph.size > size]
    assert len(found) >= 4
    assert all(size <= constants < size + KIB for constants in found)
    planned = plan(manifest, manifest.layout.size, 1e6, graphs=SCORING_GRAPHS, batch=8)
    assert planned.session_mib < 4 * size / 2**20  # and not for 30 bytes each, as structures are
