"""What is made by the piece: the same bits as at once, and little memory beside the result."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from fedzo.edge_runtime.inference import long_runs
from fedzo.protocol.artifact import layout as layouts
from fedzo.protocol.artifact.layout import Initialiser, Layout, Parameter, initial_weights
from fedzo.protocol.pruning import mask as masks
from fedzo.protocol.pruning.mask import Mask
from fedzo.protocol.replay import optimisers
from fedzo.protocol.replay.optimisers import Optimiser, OptimiserConfig

SIZES = (1, 99, 100, 101, 250)
LARGE = 1 << 20


def layout_of(*sizes: int) -> Layout:
    return Layout(tuple(Parameter(f"p{k}", (n,), True, Initialiser("normal", 0.5)) for k, n in enumerate(sizes)))


def peak_bytes(make: Callable[[], object]) -> int:
    """Over what is held before, the result included."""
    make()  # tables that are made once
    tracemalloc.start()
    try:
        result = make()
        return tracemalloc.get_traced_memory()[1] + 0 * id(result)
    finally:
        tracemalloc.stop()


def test_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(*SIZES)
    kept = np.random.default_rng(1).random(layout.size) < 0.6
    kept[list(layout.offsets)] = True
    whole = Mask(layout, kept).index()
    monkeypatch.setattr(masks, "_INDEX_STEP", 100)
    pieces = Mask(layout, kept).index()
    expected = np.concatenate([np.flatnonzero(kept[layout.slice_of(k)]) for k in range(len(SIZES))])
    assert np.array_equal(whole, expected)
    assert pieces.dtype == whole.dtype == np.int32
    assert np.array_equal(pieces, expected)
    mask = Mask.dense(layout_of(LARGE))
    assert peak_bytes(mask.index) < 6 * LARGE


def test_first_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = initial_weights(layout_of(*SIZES), 5)
    monkeypatch.setattr(layouts, "_STEP", 100)
    assert np.array_equal(initial_weights(layout_of(*SIZES), 5), whole)
    monkeypatch.undo()
    assert peak_bytes(lambda: initial_weights(layout_of(LARGE), 5)) < 8 * LARGE


@pytest.mark.parametrize("name", optimisers.OPTIMISERS)
@pytest.mark.parametrize("front", [0, 1, 100, 130, 250])
def test_steps(name: optimisers.OptimiserName, front: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = OptimiserConfig(name, weight_decay=0.25, front_rate=0.5)
    found = []
    for piece in (1 << 16, 100):
        monkeypatch.setattr(optimisers, "_PIECE", piece)
        rng = np.random.default_rng(3)
        weights, optimiser = rng.standard_normal(250).astype(np.float32), Optimiser(config, 250, front)
        for _ in range(3):
            optimiser.step(weights, rng.standard_normal(250).astype(np.float32), np.float32(0.125))
        found.append(np.concatenate([weights, *optimiser.state]))
    assert np.array_equal(found[0], found[1])


def test_a_step_takes_little_memory() -> None:
    optimiser, weights = Optimiser(OptimiserConfig("adam"), LARGE), np.ones(LARGE, np.float32)
    assert peak_bytes(lambda: optimiser.step(weights, weights.copy(), np.float32(0.1))) < 8 * LARGE


def test_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_runs, "LONG_RUN", 40)
    runs = [np.arange(start, start + n) for start, n in ((500, 130), (5, 1), (9, 39), (700, 40), (100, 3), (200, 250))]
    places = np.concatenate(runs).astype(np.intp)
    values, expected = np.arange(1, places.size + 1, dtype=np.float32), np.zeros(1000, np.float32)
    expected[places] = values
    for piece in (1 << 16, 7, 100, 130, 463):
        monkeypatch.setattr(long_runs, "_PIECE", piece)
        target, scatter = np.zeros(1000, np.float32), long_runs.Scatter(places)
        scatter.write(values, target)
        assert np.array_equal(target, expected)
        assert [stop - start for start, stop, place in scatter._pieces if place >= 0] == [130, 40, 250]
    monkeypatch.undo()
    spread = np.arange(0, 2 * LARGE, 2, dtype=np.intp)
    assert peak_bytes(lambda: long_runs.Scatter(spread)) < 8 * LARGE
    for few in (0, 1):
        assert not [piece for piece in long_runs.Scatter(np.zeros(few, np.intp))._pieces if piece[2] >= 0]
