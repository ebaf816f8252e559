"""What is checked of the values in files of users, without a copy of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...protocol.errors import DataError
from .mapped import PIECE_BYTES, pieces, release
from .samples import Conversion

__all__ = ["check_inputs", "checked_labels"]

_Range = tuple[float, float]


def checked_labels(y: NDArray[Any], n: int, n_classes: int, where: str) -> NDArray[np.unsignedinteger[Any]]:
    """Labels in the smallest type that holds the classes, owned by the caller.

    Raises:
        DataError: They are no class numbers, or not one a sample.
    """
    y = np.asarray(y)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != (n,):
        hint = "use class numbers: y.argmax(axis=1)" if y.ndim == 2 else "there must be one label a sample"
        raise DataError(f"{where} holds {n} samples and labels of shape {y.shape}", hint=hint)
    if y.dtype.kind not in "iuf":
        raise DataError(f"{where} holds labels of type {y.dtype}", hint="use class numbers from 0")
    labels = np.empty(n, dtype=np.min_scalar_type(max(0, n_classes - 1)))
    lowest, highest, rows = math.inf, -math.inf, PIECE_BYTES // y.dtype.itemsize
    for start in range(0, n, rows):
        part = y[start : start + rows]
        if part.dtype.kind == "f" and not (np.isfinite(part).all() and (part == np.rint(part)).all()):
            raise DataError(f"{where} holds labels that are no whole numbers", hint="use class numbers from 0")
        lowest, highest = min(lowest, int(part.min())), max(highest, int(part.max()))
        if lowest >= 0 and highest < n_classes:
            labels[start : start + rows] = part
        release(part)
    if n and (lowest < 0 or highest >= n_classes):
        raise DataError(
            f"{where} holds labels from {lowest} to {highest}, the model has classes 0 to {n_classes - 1}",
            hint="number the classes from 0, or export the model with another --classes",
        )
    return labels


def check_inputs(x: NDArray[Any], conversion: Conversion, where: str) -> None:
    """Check that stored values are finite float32 numbers, and stay so when they are converted.

    Raises:
        DataError: A sample holds a value that is none, or becomes none.
    """
    if not len(x):
        return
    if x.dtype.kind == "f":
        ends = _range(x)
        if not _finite(ends):
            number = _first(x, lambda part: not _finite(_range(part)))
            raise DataError(
                f"{where}: sample {number} holds a value that is no finite float32",
                hint="remove such samples, or replace the values",
            )
    else:
        ends = (float(np.iinfo(x.dtype).min), float(np.iinfo(x.dtype).max))
    # A conversion keeps the order of values, so that those between the ends stay finite if the ends do.
    shape = np.broadcast_shapes(conversion.mean.shape, conversion.inverse_std.shape)
    with np.errstate(all="ignore"):
        converted = [conversion.normalise(np.full(shape, end, dtype=np.float32)) for end in (*ends, 0.0)]
    if not np.isfinite(converted).all():
        _check_each(x, conversion, where)


def _check_each(x: NDArray[Any], conversion: Conversion, where: str) -> None:
    """Convert every sample: the ends may be those of a channel that is divided by less."""
    mean, std = conversion.mean, np.float32(1.0) / conversion.inverse_std
    plain = dataclasses.replace(conversion, mean=np.zeros_like(mean), inverse_std=np.ones_like(std))
    for number in range(len(x)):
        rows = np.array([number])
        with np.errstate(all="ignore"):
            bad = ~np.isfinite(conversion.apply(x, rows)[0])
        if bad.any():
            place = np.unravel_index(int(bad.argmax()), bad.shape)
            value = float(plain.apply(x, rows)[0][place])
            less, divisor = (float(np.broadcast_to(a, bad.shape)[place]) for a in (mean, std))
            raise DataError(
                f"{where}: sample {number} holds {value:g}; minus the mean {less:g} and divided by the std {divisor:g}"
                " it is no finite float32",
                hint="give the mean and the std of these data",
            )


def _range(x: NDArray[Any]) -> _Range:
    """The smallest and the largest value as float32 numbers; not finite if one value is not."""
    low, high = np.float32(np.inf), np.float32(-np.inf)
    with np.errstate(all="ignore"):
        for piece in pieces(x):
            low = np.minimum(low, np.float32(piece.min()))
            high = np.maximum(high, np.float32(piece.max()))
    return float(low), float(high)


def _finite(ends: _Range) -> bool:
    return all(map(math.isfinite, ends))


def _first(x: NDArray[Any], is_bad: Callable[[NDArray[Any]], bool]) -> int:
    """The first sample that is bad; there is one."""
    low, high = 0, len(x)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_bad(x[low:middle]) else (middle, high)
    return low
