"""Samples in their stored type, and the batches that are made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Batch", "Conversion", "Samples"]


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

    def apply(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        """Convert ``stored[n, ...]``: ``float32[n, *input_shape]``, owned by the caller."""
        if self.channels_last:
            stored = np.moveaxis(stored, -1, 1)
        out = np.zeros((len(stored), *self.input_shape), dtype=np.float32)
        rows, columns = self.pad
        inner = out[..., rows : out.shape[-2] - rows, columns : out.shape[-1] - columns] if rows or columns else out
        inner[...] = stored.reshape(inner.shape)
        if self.scale != 1.0:
            np.multiply(inner, np.float32(self.scale), out=inner)
        np.subtract(out, self.mean, out=out)
        return np.multiply(out, self.inverse_std, out=out)


class Samples:
    """Some rows of a stored array, converted when they are asked for.

    Args:
        stored: ``(n, ...)`` in the file's own type; may be mapped; not copied.
        labels: ``int64[n]``.
        conversion: How rows become inputs.
        rows: ``int64[m]``, which rows; all by default.
    """

    def __init__(
        self,
        stored: NDArray[Any],
        labels: NDArray[np.int64],
        conversion: Conversion,
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        self._stored = stored
        self._labels = labels
        self._conversion = conversion
        self._rows = np.arange(len(labels), dtype=np.int64) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def labels(self) -> NDArray[np.int64]:
        """``int64[m]``, owned by the caller."""
        return self._labels[self._rows]

    @property
    def parts(self) -> tuple[NDArray[Any], NDArray[np.int64], Conversion, NDArray[np.int64]]:
        """What it was made of: stored array, labels, conversion and rows; none is copied."""
        return self._stored, self._labels, self._conversion, self._rows

    @property
    def resident_bytes(self) -> int:
        """Memory that the stored samples take; 0 when they are mapped from a file."""
        base: Any = self._stored
        while isinstance(base, np.ndarray):
            if isinstance(base, np.memmap):
                return self._labels.nbytes
            base = base.base
        return int(self._stored.nbytes + self._labels.nbytes)

    def shares_memory_with(self, other: Samples) -> bool:
        """Whether both are rows of one stored array."""
        return self._stored is other._stored

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """The samples at ``indices int64[n]``, counted within these rows."""
        rows = self._rows[indices]
        return Batch(self._conversion.apply(self._stored[rows]), self._labels[rows])

    def batches(self, size: int) -> Iterator[Batch]:
        """All samples in order, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.batch(np.arange(start, min(start + size, len(self)), dtype=np.int64))

    def subset(self, indices: NDArray[np.int64]) -> Samples:
        """Some of these samples, sharing the stored array."""
        return Samples(self._stored, self._labels, self._conversion, self._rows[indices])
