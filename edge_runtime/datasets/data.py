"""Training data on a board: files in, micro-batches out, the same ones after every restart.

A data set keeps its stored type (``uint8`` images stay ``uint8``, files stay mapped); the conversion to ``float32``
happens in the batch. What can be misread is refused rather than guessed: shapes, label ranges, axis order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...protocol.errors import ConfigError, DataError
from ...protocol.perturbation.streams import Purpose, permutation
from .arrays import member_names, read_idx, read_npy, read_npz
from .checks import check_inputs, checked_labels
from .samples import Batch, Conversion, Samples

__all__ = ["Batch", "Dataset", "Samples", "as_samples", "batch_indices", "count_samples", "load_dataset"]

Axes = Literal["auto", "channels_first", "channels_last"]
_Reader = Callable[[], NDArray[Any]]
_ORDER_BYTES = 20
"""A sample, while the order of an epoch is made: random word, number, and half a number to sort; 4 stay."""

_SMALLEST_STD = 1e-38
_PAIRS = (("x", "y"), ("images", "labels"), ("data", "target"), ("data", "labels"), ("inputs", "targets"))
_SPLITS = (("x_train", "y_train", "x_test", "y_test"), ("train_images", "train_labels", "test_images", "test_labels"))
_IDX_SPLITS = (("train-images", "train-labels"), ("t10k-images", "t10k-labels"))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test samples of one device.

    Attributes:
        train: Never empty.
        test: The file's own test part, or what was held out; may be empty.
    """

    train: Samples
    test: Samples

    @property
    def resident_bytes(self) -> int:
        """Memory that both parts take, and the order of an epoch while it is made."""
        shared = self.train.shares_memory_with(self.test)
        test = self.test.row_bytes if shared else self.test.resident_bytes
        return self.train.resident_bytes + test + _ORDER_BYTES * len(self.train)


def load_dataset(
    path: str | Path,
    input_shape: tuple[int, ...],
    n_classes: int,
    *,
    holdout: float | None = None,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    axes: Axes = "auto",
    pad: bool = False,
    limit_mib: int = 2048,
) -> Dataset:
    """Load and check labelled samples.

    ``path`` may be

    * a ``.npz`` with ``x, y`` (or ``images, labels``; ``data, target``; ...), or with ``x_train, y_train`` and
      optionally ``x_test, y_test``;
    * a folder with ``x.npy, y.npy`` or ``x_train.npy, ...``, or one of these files;
    * a folder with the four MNIST-style IDX files, plain or ``.gz``, or one of the image files;
    * a folder with one folder of images a class (needs ``fedzo[images]``; see :mod:`.images`).

    ``uint8`` values are scaled to ``[0, 1]``; all others are taken as they are. A sample may be stored with channels
    last when its shape fits in no other way, without the channel axis when there is one channel, or flat when there
    is one channel; everything else needs ``axes``.

    Args:
        path: File or folder.
        input_shape: Shape of one sample at the network, channels first.
        n_classes: Labels are ``0 <= y < n_classes``.
        holdout: Fraction of the training samples that becomes the test part, when the files have none.
        seed: Which samples are held out.
        mean: One number, or one a channel, subtracted after scaling.
        std: One number, or one a channel, divided by last.
        axes: Order of the stored axes, when the shape leaves it open.
        pad: Center images that are smaller than ``input_shape`` in zeros (28x28 into 32x32).
        limit_mib: Largest compressed array to unpack.

    Raises:
        DataError: The data cannot be used; the message says what was found and how to fix it.
        ConfigError: An argument is out of range.
    """
    if holdout is not None and not 0.0 <= holdout < 1.0:
        raise ConfigError(f"holdout is {holdout}, it must be at least 0 and below 1")
    source = Path(path)
    arrays = _read(source, input_shape, n_classes, limit_mib)
    parts = [
        as_samples(x, y, input_shape, n_classes, mean=mean, std=std, axes=axes, pad=pad, where=str(source))
        for x, y in arrays
    ]
    train = parts[0]
    if len(train) == 0:
        raise DataError(f"{source} has no training samples")
    if len(parts) == 2:
        return Dataset(train, parts[1])
    held = _held_out(len(train), holdout)
    if not held:
        return Dataset(train, train.subset(np.zeros(0, dtype=np.int64)))
    order = permutation(seed, Purpose.HOLDOUT, 0, 0, len(train))
    return Dataset(train.subset(np.sort(order[held:])), train.subset(np.sort(order[:held])))


def as_samples(
    x: NDArray[Any],
    y: NDArray[Any],
    input_shape: tuple[int, ...],
    n_classes: int,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    axes: Axes = "auto",
    pad: bool = False,
    where: str = "the array",
) -> Samples:
    """Check labelled samples that are in memory, or mapped; they are not copied.

    Args:
        x: ``(n, ...)``, as :func:`load_dataset` would find it in a file.
        y: ``(n,)``, class numbers.
        input_shape: See :func:`load_dataset`.
        n_classes: See :func:`load_dataset`.
        mean: See :func:`load_dataset`.
        std: See :func:`load_dataset`.
        axes: See :func:`load_dataset`.
        pad: See :func:`load_dataset`.
        where: Begins the messages.

    Raises:
        DataError: They cannot be used.
        ConfigError: An argument is out of range.
    """
    conversion = _conversion(x, input_shape, mean, std, axes, pad, where)
    labels = checked_labels(y, len(x), n_classes, where)
    check_inputs(x, conversion, where)
    return Samples(x, labels, conversion)


def batch_indices(seed: int, step: int, device_ordinal: int, n: int, batch: int) -> NDArray[np.int64]:
    """Which samples a device uses in one step: successive cuts of seeded permutations.

    The permutations of all epochs are laid end to end and step ``t`` takes the entries ``t * size`` to
    ``(t + 1) * size``, so every sample comes once an epoch and any step is reached without state.

    Args:
        seed: Run seed.
        step: Counts from 0.
        device_ordinal: Number of the device; devices with equal data draw different batches.
        n: Number of samples, at least 1.
        batch: Wanted size.

    Returns:
        ``int64[size]`` with ``size = min(batch, n)``, without repeats except where two epochs meet; owned by the
        caller.
    """
    if n < 1 or batch < 1 or step < 0:
        raise ConfigError(f"a batch needs n >= 1, batch >= 1 and step >= 0, not {n}, {batch} and {step}")
    size = min(batch, n)
    epoch, start = divmod(step * size, n)
    # Copied: an order is freed before the next one is made.
    indices = _latest_order.of(seed, epoch, device_ordinal, n)[start : start + size].astype(np.int64)
    if len(indices) < size:
        more = _latest_order.of(seed, epoch + 1, device_ordinal, n)[: size - len(indices)]
        indices = np.concatenate([indices, more.astype(np.int64)])
    return indices


class _LatestOrder:
    """The order of the samples in the epoch that was asked for last."""

    def __init__(self) -> None:
        self._found: tuple[tuple[int, int, int, int], NDArray[np.uint32]] | None = None

    def of(self, seed: int, epoch: int, device_ordinal: int, n: int) -> NDArray[np.uint32]:
        key, found = (seed, epoch, device_ordinal, n), self._found
        if found is None or found[0] != key:
            found = self._found = None
            order = permutation(seed, Purpose.BATCH, epoch, device_ordinal, n)
            found = self._found = (key, order.astype(np.uint32))
        return found[1]


_latest_order = _LatestOrder()


def count_samples(path: str | Path, *, holdout: float | None = None, limit_mib: int = 2048) -> tuple[int, int]:
    """How many training and test samples :func:`load_dataset` would find; reads labels only and needs no model.

    Args:
        path: File or folder.
        holdout: As for :func:`load_dataset`.
        limit_mib: As for :func:`load_dataset`.

    Raises:
        DataError: The data cannot be read, or there are no training samples.
    """
    source = Path(path)
    parts = _locate(source, limit_mib)
    if parts:
        counts = [labels().size for _, labels in parts]
    else:
        from .images import count_images

        counts = count_images(source)
    if counts[0] == 0:
        raise DataError(f"{source} has no training samples", hint="see the kinds of data in `fedzo-device join --help`")
    if len(counts) == 2:
        return counts[0], counts[1]
    held = _held_out(counts[0], holdout)
    return counts[0] - held, held


def _held_out(n: int, holdout: float | None) -> int:
    return max(0, min(round(n * (holdout or 0.0)), n - 1))


def _read(
    path: Path, input_shape: tuple[int, ...], n_classes: int, limit_mib: int
) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Pairs of inputs and labels: the training part and, if there is one, the test part."""
    parts = _locate(path, limit_mib)
    if parts:
        return [(inputs(), labels()) for inputs, labels in parts]
    from .images import read_image_folder

    return read_image_folder(path, input_shape, n_classes, limit_mib)


def _locate(path: Path, limit_mib: int) -> list[tuple[_Reader, _Reader]]:
    """Readers of inputs and labels for each part; none for a folder of image folders."""
    if not path.exists():
        raise DataError(f"there is no data at {path}", hint="give a .npz file or a folder; see `fedzo-device --help`")
    if path.suffix == ".npz":
        names = _choose(member_names(path), str(path))
        return _pairs([functools.partial(_member, path, name, limit_mib) for name in names])
    folder = path if path.is_dir() else path.parent
    files = {entry.name: entry for entry in folder.iterdir() if entry.is_file()}
    idx = [pair for split in _IDX_SPLITS if (pair := _idx_pair(files, split))]
    if idx and (path.is_dir() or path in idx[0]):
        return _pairs([functools.partial(read_idx, file, limit_mib) for pair in idx for file in pair])
    stems = {name[:-4] for name in files if name.endswith(".npy")}
    if path.suffix == ".npy" or (path.is_dir() and stems):
        names = _choose(stems, str(folder))
        return _pairs([functools.partial(read_npy, files[f"{name}.npy"]) for name in names])
    if path.is_dir():
        return []
    raise DataError(
        f"{path} is of no kind that can be read",
        hint="use .npz, .npy pairs, MNIST-style IDX files or a folder of image folders",
    )


def _member(path: Path, name: str, limit_mib: int) -> NDArray[Any]:
    return read_npz(path, [name], limit_mib)[name]


def _pairs(readers: list[_Reader]) -> list[tuple[_Reader, _Reader]]:
    return list(zip(readers[::2], readers[1::2], strict=True))


def _choose(names: set[str], where: str) -> list[str]:
    for train_x, train_y, test_x, test_y in _SPLITS:
        if {train_x, train_y} <= names:
            return [train_x, train_y, test_x, test_y] if {test_x, test_y} <= names else [train_x, train_y]
    for pair in _PAIRS:
        if set(pair) <= names:
            return list(pair)
    raise DataError(
        f"{where} has the arrays {', '.join(sorted(names)) or '(none)'}",
        hint="it needs x and y, or x_train, y_train and optionally x_test, y_test",
    )


def _idx_pair(files: dict[str, Path], stems: tuple[str, str]) -> tuple[Path, Path] | None:
    found = []
    for stem in stems:
        matches = sorted(name for name in files if name.startswith(stem) and "idx" in name)
        if not matches:
            return None
        found.append(files[matches[0]])
    return found[0], found[1]


def _conversion(
    x: NDArray[Any],
    input_shape: tuple[int, ...],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    axes: Axes,
    pad: bool,
    where: str,
) -> Conversion:
    if x.dtype.kind not in "iuf":
        raise DataError(f"{where} holds inputs of type {x.dtype}", hint="use uint8 images or float32 values")
    if x.ndim < 2:
        raise DataError(f"{where} holds inputs of shape {x.shape}, expected (samples, {_text(input_shape)})")
    channels_last, margins = _arrangement(x.shape[1:], input_shape, axes, pad, where)
    return Conversion(
        input_shape=input_shape,
        channels_last=channels_last,
        pad=margins,
        scale=1.0 / 255.0 if x.dtype == np.uint8 else 1.0,
        mean=_per_channel("mean", mean, 0.0, input_shape),
        inverse_std=np.float32(1.0) / _per_channel("std", std, 1.0, input_shape),
    )


def _arrangement(
    stored: tuple[int, ...], wanted: tuple[int, ...], axes: Axes, pad: bool, where: str
) -> tuple[bool, tuple[int, int]]:
    candidates: list[tuple[bool, tuple[int, ...]]] = []
    if len(stored) == len(wanted):
        if axes != "channels_last":
            candidates.append((False, stored))
        if axes != "channels_first" and len(wanted) >= 2:
            candidates.append((True, (stored[-1], *stored[:-1])))
    elif len(wanted) >= 2 and wanted[0] == 1 and len(stored) == len(wanted) - 1:
        candidates.append((False, (1, *stored)))
    one_channel = len(wanted) >= 2 and wanted[0] == 1
    if len(stored) == 1 and stored[0] == math.prod(wanted) and (one_channel or axes == "channels_first"):
        return False, (0, 0)
    for channels_last, shape in candidates:
        if shape == wanted:
            return channels_last, (0, 0)
    for channels_last, shape in candidates:
        gaps = [w - s for w, s in zip(wanted[-2:], shape[-2:], strict=True)]
        if len(wanted) == 3 and shape[0] == wanted[0] and all(gap >= 0 and gap % 2 == 0 for gap in gaps):
            if pad:
                return channels_last, (gaps[0] // 2, gaps[1] // 2)
            raise DataError(
                f"{where} holds samples of shape ({_text(stored)}), the model takes ({_text(wanted)})",
                hint="they are smaller images: give --pad (pad=True in Python), or export the model for their size",
            )
    raise DataError(
        f"{where} holds samples of shape ({_text(stored)}), the model takes ({_text(wanted)})",
        hint=f"reshape them to (samples, {_text(wanted)}), or export it with --input {'x'.join(map(str, stored))}",
    )


def _per_channel(
    name: str, values: Sequence[float] | None, default: float, input_shape: tuple[int, ...]
) -> NDArray[np.float32]:
    array = np.asarray([default] if values is None else values, dtype=np.float32)
    usable = array.shape in ((1,), (input_shape[0],)) and bool(np.isfinite(array).all())
    if not usable or (name == "std" and (array < _SMALLEST_STD).any()):
        raise ConfigError(
            f"{name} is {values!r}, it must be 1 or {input_shape[0]} finite numbers, std at least {_SMALLEST_STD}"
        )
    return array.reshape(-1, *[1] * (len(input_shape) - 1))


def _text(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
