"""Samples in their stored type, and the batches that are made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .mapped import PIECE_BYTES, is_mapped, release

__all__ = ["Batch", "Conversion", "Samples"]

_TOUCHED_BYTES = 64 << 10
"""What comes into memory with a small sample of a mapped file, by the kernel's rule."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples as the engine takes them.

    Attributes:
        x: ``float32[n, *input_shape]``, contiguous, owned by the holder of the batch.
        y: ``int64[n]``.
    """

    x: NDArray[np.float32]
    y: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, eq=False)
class Conversion:
    """How stored samples become the network's input.

    Attributes:
        input_shape: Shape of one sample at the network.
        channels_last: Stored samples are ``(height, width, channels)`` and get their channels moved to the front.
        pad: Rows and columns of zeros added on each side of the last two axes.
        scale: Factor for stored values: ``1/255`` for ``uint8``, else 1.
        mean: ``float32``, broadcast over a sample, subtracted after scaling.
        inverse_std: ``float32``, broadcast over a sample, multiplied last.
    """

    input_shape: tuple[int, ...]
    channels_last: bool
    pad: tuple[int, int]
    scale: float
    mean: NDArray[np.float32]
    inverse_std: NDArray[np.float32]

    def apply(self, stored: NDArray[Any], rows: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """Convert ``rows`` of ``stored[n, ...]``: ``float32[m, *input_shape]``, owned by the caller.

        Nothing else is allocated: values are converted on their way out of the stored array, row by row.
        """
        if self.channels_last:
            stored = np.moveaxis(stored, -1, 1)
        values = np.asarray(stored)
        out = np.zeros((len(rows), *self.input_shape), dtype=np.float32)
        above, left = self.pad
        inner = out[..., above : out.shape[-2] - above, left : out.shape[-1] - left] if above or left else out
        shape, at_once = inner.shape[1:], max(1, PIECE_BYTES // max(1, _TOUCHED_BYTES, values[:1].nbytes))
        for place, row in enumerate(rows.tolist(), start=1):
            inner[place - 1] = values[row].reshape(shape)
            if place % at_once == 0:
                release(stored)
        release(stored)
        return self.normalise(out)

    def normalise(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scale values, subtract the mean and divide by the standard deviation, in place."""
        if self.scale != 1.0:
            np.multiply(values, np.float32(self.scale), out=values)
        np.subtract(values, self.mean, out=values)
        return np.multiply(values, self.inverse_std, out=values)


class Samples:
    """Some rows of a stored array, converted when they are asked for.

    Args:
        stored: ``(n, ...)`` in the file's own type; may be mapped; not copied.
        labels: Whole numbers, ``(n,)``; not copied.
        conversion: How rows become inputs.
        rows: Whole numbers, ``(m,)``, which rows; all by default.
    """

    def __init__(
        self,
        stored: NDArray[Any],
        labels: NDArray[np.integer[Any]],
        conversion: Conversion,
        rows: NDArray[np.integer[Any]] | None = None,
    ) -> None:
        self._stored = stored
        self._labels = labels
        self._conversion = conversion
        self._rows = rows

    def __len__(self) -> int:
        return len(self._labels if self._rows is None else self._rows)

    @property
    def labels(self) -> NDArray[np.int64]:
        """``int64[m]``, owned by the caller."""
        return (self._labels if self._rows is None else self._labels[self._rows]).astype(np.int64)

    @property
    def parts(
        self,
    ) -> tuple[NDArray[Any], NDArray[np.integer[Any]], Conversion, NDArray[np.integer[Any]] | None]:
        """What it was made of: stored array, labels, conversion and rows, None for all; none is copied."""
        return self._stored, self._labels, self._conversion, self._rows

    @property
    def resident_bytes(self) -> int:
        """Memory of samples, labels and row numbers; samples that are mapped from a file take none."""
        stored = 0 if is_mapped(self._stored) else self._stored.nbytes
        return int(stored + self._labels.nbytes + self.row_bytes)

    @property
    def row_bytes(self) -> int:
        """Memory of the row numbers: what it takes beside other rows of the same samples."""
        return 0 if self._rows is None else int(self._rows.nbytes)

    def shares_memory_with(self, other: Samples) -> bool:
        """Whether both are rows of one stored array."""
        return self._stored is other._stored

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """The samples at ``indices int64[n]``, counted within these rows."""
        rows = self._chosen(indices)
        return Batch(self._conversion.apply(self._stored, rows), self._labels[rows].astype(np.int64))

    def batches(self, size: int) -> Iterator[Batch]:
        """All samples in order, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.batch(np.arange(start, min(start + size, len(self)), dtype=np.int64))

    def subset(self, indices: NDArray[np.int64]) -> Samples:
        """Some of these samples, sharing the stored array."""
        rows = self._chosen(indices)
        if len(self._labels) <= 1 << 32:
            rows = rows.astype(np.uint32)
        return Samples(self._stored, self._labels, self._conversion, rows)

    def _chosen(self, indices: NDArray[np.int64]) -> NDArray[np.integer[Any]]:
        if self._rows is not None:
            return self._rows[indices]
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"there are {len(self)} samples, not sample {indices.min()} to {indices.max()}")
        return indices
