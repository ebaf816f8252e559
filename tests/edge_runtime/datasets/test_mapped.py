"""What data take: a mapped file passes through the process, and what the plan counts is what is taken."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from fedzo.edge_runtime.datasets.arrays import read_npy
from fedzo.edge_runtime.datasets.data import Dataset, as_samples, batch_indices, load_dataset
from fedzo.edge_runtime.datasets.mapped import PIECE_BYTES, is_mapped, pieces, release
from fedzo.edge_runtime.planning.memory import _batch_bytes, _status_mib, peak_rss_mib, reset_peak
from fedzo.protocol.errors import DataError

SHAPE = (3, 64, 64)


def _mapped(folder: Path, dtype: Any, n: int, shape: tuple[int, ...] = SHAPE, order: str = "C") -> Path:
    """``x.npy`` and ``y.npy`` of zeros, written without holding them."""
    x = np.lib.format.open_memmap(
        folder / "x.npy", mode="w+", dtype=dtype, shape=(n, *shape), fortran_order=order == "F"
    )
    x[:] = 0
    x.flush()
    del x
    np.save(folder / "y.npy", np.arange(n) % 2)
    return folder


needs_peaks = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system has no /proc")


@needs_peaks
@pytest.mark.parametrize(("dtype", "order"), [("<f4", "C"), ("<f4", "F"), ("<f8", "C"), ("u1", "C")])
def test_a_mapped_file_of_64_mib_passes_through_the_process(tmp_path: Path, dtype: str, order: str) -> None:
    folder = _mapped(tmp_path, dtype, (64 << 20) // (math.prod(SHAPE) * np.dtype(dtype).itemsize), order=order)
    if not reset_peak():
        pytest.skip("peaks cannot be reset")
    before = _status_mib("VmRSS")
    tracemalloc.start()
    data = load_dataset(folder, SHAPE, 2, holdout=0.1)
    taken = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert taken < 1.0
    assert peak_rss_mib() - before < 8.0  # a piece, and what the kernel maps around it
    assert _status_mib("VmRSS") - before < 4.0
    if order == "C":  # Any sample of the other lies all over the file.
        for step in range(len(data.train) // 64):
            data.train.batch(batch_indices(0, step, 0, len(data.train), 64))
        # A batch takes 3 MiB; 16 samples bring up to 2 MiB each with them, where the kernel keeps the file so.
        assert peak_rss_mib() - before < 45.0
        assert _status_mib("VmRSS") - before < 8.0


def test_what_a_plan_counts_is_what_data_take(tmp_path: Path) -> None:
    n = 200_000
    folder = _mapped(tmp_path, np.uint8, n, (1, 4))
    tracemalloc.start()
    data = load_dataset(folder, (1, 4), 2, holdout=0.2)
    loading = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    for step in (0, len(data.train) // 64, len(data.train) // 32):
        batch_indices(1, step, 0, len(data.train), 64)
    held, training = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert max(loading, training) <= data.resident_bytes + (64 << 10)
    assert data.resident_bytes == n * (1 + 4) + 20 * len(data.train)
    # Labels of one byte, rows of four, and one epoch: neither the one before nor numbers of eight bytes.
    assert held <= n * 5 + 4 * len(data.train) + (64 << 10)


@pytest.mark.parametrize("dtype", ["<f8", "<f4", ">f4", "<i8", "u1"])
@pytest.mark.parametrize(("shape", "batch"), [(SHAPE, 64), (SHAPE, 1), ((1, 4), 2000)])
def test_a_batch_takes_what_is_planned(tmp_path: Path, dtype: str, shape: tuple[int, ...], batch: int) -> None:
    samples = load_dataset(_mapped(tmp_path, dtype, 2 * batch, shape), shape, 2).train
    rows = np.arange(batch)[::-1].copy()
    samples.batch(rows)
    tracemalloc.start()
    made = samples.batch(rows)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    manifest = SimpleNamespace(input_shape=shape, n_classes=2)
    assert taken <= _batch_bytes(cast("Any", manifest), batch) + (16 << 10)
    if shape is SHAPE:
        assert taken <= made.x.nbytes + made.y.nbytes + (16 << 10)


def test_samples_are_counted_by_where_their_values_lie(tmp_path: Path) -> None:
    mapped = read_npy(_mapped(tmp_path, np.uint8, 40, (1, 4)) / "x.npy")
    labels = np.zeros(40, np.int64)
    assert is_mapped(mapped)
    assert is_mapped(mapped[3:, :, ::2])
    # A copy of mapped values has numpy's type of mapped ones.
    assert not is_mapped(mapped[np.arange(40)])
    whole = as_samples(mapped, labels, (1, 4), 2)
    assert whole.resident_bytes == 40
    assert as_samples(mapped[np.arange(40)], labels, (1, 4), 2).resident_bytes == 40 * 4 + 40
    both = Dataset(whole.subset(np.arange(30)), whole.subset(np.arange(30, 40)))
    assert both.resident_bytes == 40 + 4 * 40 + 20 * 30
    with pytest.raises(IndexError):
        whole.batch(np.array([-1]))
    with pytest.raises(IndexError):
        whole.subset(np.array([40]))


def test_changes_of_a_mapped_copy_are_not_let_go(tmp_path: Path) -> None:
    x = np.load(_mapped(tmp_path, np.float32, 40, (1, 4)) / "x.npy", mmap_mode="c")
    x[:] = 7
    samples = as_samples(x, np.zeros(40, np.int64), (1, 4), 2)
    release(x)
    assert (samples.batch(np.arange(40)).x == 7).all()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize(
    "shape", [(5, 700, 700), (9, 2, 3), (3_000_001,), (4, 0), (0, 4), (2, 3_000_001), (1 << 19, 1)]
)
def test_pieces_hold_every_value_once(shape: tuple[int, ...], order: Any, step: int) -> None:
    x = np.asarray(np.arange(np.prod(shape), dtype=np.int32).reshape(shape), order=order)[..., ::step]
    found = list(pieces(x))
    assert all(piece.nbytes <= PIECE_BYTES and np.may_share_memory(piece, x) for piece in found)
    assert np.array_equal(np.sort(np.concatenate([np.zeros(0, np.int32), *map(np.ravel, found)])), np.sort(x.ravel()))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<f2"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_sample_with_a_bad_value_is_named(order: Any, dtype: str, bad: float) -> None:
    x = np.zeros((3_000, 300), dtype, order=order)
    x[2_345, 17] = x[2_900, 0] = bad
    with pytest.raises(DataError, match="sample 2345 holds a value that is no finite float32"):
        as_samples(x, np.zeros(3_000, np.int8), (300,), 2)
