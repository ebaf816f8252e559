"""Labelled images of an experiment: scikit-learn's digits, or the user's own files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..edge_runtime.datasets.arrays import member_names, read_npz
from ..protocol.errors import ConfigError, DataError
from ..protocol.perturbation.streams import Purpose, permutation

__all__ = ["DIGITS", "Images", "digits", "load_images"]

DIGITS = "digits"
_ARRAYS = ("x", "y", "xt", "yt")
_LIMIT_MIB = 8192
_TEST_DIGITS = 360


@dataclass(frozen=True, eq=False)
class Images:
    """A data set; results call it by its name, wherever it lies.

    Attributes:
        name: Of lower-case letters, digits and ``_``.
        x: ``float32[n, channels, height, width]``, normalised.
        y: ``int64[n]``, class numbers from 0.
        xt: Test images.
        yt: Their classes.
    """

    name: str
    x: NDArray[np.float32]
    y: NDArray[np.int64]
    xt: NDArray[np.float32]
    yt: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return tuple(self.x.shape[1:])

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return int(max(self.y.max(), self.yt.max())) + 1


def digits() -> Images:
    """Scikit-learn's digits enlarged to 32x32, values from -1 to 1; a fifth of them is the test set.

    Raises:
        ConfigError: Scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("the digits come with scikit-learn", hint="pip install 'fedzo[experiments]'") from None
    images, labels = load_digits(return_X_y=True)
    x = np.kron(images.reshape(-1, 1, 8, 8) / 8.0 - 1.0, np.ones((4, 4))).astype(np.float32)
    order = permutation(0, Purpose.HOLDOUT, 0, 0, len(x))
    x, y = x[order], labels[order].astype(np.int64)
    train = len(x) - _TEST_DIGITS
    return Images(DIGITS, x[:train], y[:train], x[train:], y[train:])


def load_images(entries: Sequence[str]) -> list[Images]:
    """Data sets as the command line names them.

    Args:
        entries: ``digits``, or ``NAME=FILE.npz`` with the arrays ``x``, ``y``, ``xt`` and ``yt``; images are
            ``float32[n, channels, height, width]`` and normalised.

    Raises:
        ConfigError: An entry has another form, or a name comes twice.
        DataError: A file cannot be used.
    """
    found: list[Images] = []
    for entry in entries:
        name, equals, file = entry.partition("=")
        if entry == DIGITS:
            found.append(digits())
        elif equals and file and re.fullmatch(r"[a-z0-9_]+", name):
            found.append(_read(name, Path(file)))
        else:
            raise ConfigError(f"the data set is {entry!r}", hint="use digits, or NAME=FILE.npz such as cifar10=c.npz")
    names = [images.name for images in found]
    if len(set(names)) < len(names) or not names:
        raise ConfigError(f"the data sets are {', '.join(names) or 'none'}", hint="name each once")
    return found


def _read(name: str, path: Path) -> Images:
    missing = set(_ARRAYS) - member_names(path)
    if missing:
        raise DataError(f"{path} has no array {min(missing)!r}", hint="it needs x, y (training) and xt, yt (test)")
    arrays = read_npz(path, _ARRAYS, _LIMIT_MIB)
    x, y = _checked(arrays["x"], arrays["y"], f"{path}: x, y")
    xt, yt = _checked(arrays["xt"], arrays["yt"], f"{path}: xt, yt")
    if x.shape[1:] != xt.shape[1:]:
        raise DataError(f"{path}: training images are {x.shape[1:]}, test images {xt.shape[1:]}")
    return Images(name, x, y, xt, yt)


def _checked(x: NDArray[Any], y: NDArray[Any], where: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    if x.ndim != 4 or x.dtype != np.float32 or not len(x):
        raise DataError(
            f"{where}: images are {x.dtype}{list(x.shape)}", hint="give float32[n, channels, height, width]"
        )
    if y.shape != (len(x),) or y.dtype.kind not in "iu" or int(y.min()) < 0 or int(y.max()) >= 1 << 16:
        raise DataError(f"{where}: labels are {y.dtype}{list(y.shape)}", hint="give one class number from 0 an image")
    return x, y.astype(np.int64)
