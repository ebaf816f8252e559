"""The data sets of the benchmark as files, ``python -m benchmarks.learning.data --help``.

A data folder holds ``fashion_mnist.npz``, ``digits.npz``, ``cifar10.npz`` and, if wanted, ``cifar100.npz``: arrays
``x`` and ``xt`` (``float32[n, channels, 32, 32]``, normalised), ``y`` and ``yt`` (``int64[n]``). Digits come with
scikit-learn. Fashion-MNIST is made from its four IDX files, plain or ``.gz``, CIFAR from the folder of its "python
version" (``cifar-10-batches-py``, ``cifar-100-python``), where torchvision also puts them::

    python -m benchmarks.learning.data OUT --fashion-mnist FashionMNIST/raw --cifar10 cifar-10-batches-py
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import pickle
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedzo.edge_runtime.datasets.arrays import read_idx
from fedzo.protocol.errors import DataError
from fedzo.protocol.perturbation.streams import Purpose, permutation

__all__ = ["CLASSES", "FILES", "Parts", "cifar", "digits", "fashion_mnist", "prepare"]

Arrays = Mapping[str, NDArray[Any]]
FILES = {
    "fashion_mnist": ("fashion_mnist.npz", "fashion.npz"),
    "digits": ("digits.npz",),
    "cifar10": ("cifar10.npz", "cifar.npz"),
    "cifar100": ("cifar100.npz",),
}
CLASSES = {"fashion_mnist": 10, "digits": 10, "cifar10": 10, "cifar100": 100}
_SIDE = 32
_DIGITS_TEST = 360
_VALIDATION = {"digits": 0.2}  # a tenth of 1,437 images says too little
_MEANS = {"cifar10": (0.4914, 0.4822, 0.4465), "cifar100": (0.5071, 0.4865, 0.4409)}
_DEVIATIONS = {"cifar10": (0.2470, 0.2435, 0.2616), "cifar100": (0.2673, 0.2564, 0.2762)}


class Parts:
    """Arrays of one data set as mapped files, which processes share.

    Args:
        folder: Of :func:`prepare`.

    Attributes:
        x: ``float32[n, channels, 32, 32]`` to train on.
        y: ``int64[n]``.
        xt: What accuracy is measured on.
        yt: Its labels.
    """

    def __init__(self, folder: Path) -> None:
        self.x, self.y, self.xt, self.yt = (
            np.load(folder / f"{name}.npy", mmap_mode="r" if name.startswith("x") else None)
            for name in ("x", "y", "xt", "yt")
        )


def find(folder: Path, name: str) -> Path | None:
    """The file of a data set, if it is there."""
    return next((folder / file for file in FILES[name] if (folder / file).is_file()), None)


def prepare(source: Path, name: str, part: str, work: Path) -> Path:
    """Unpack a data set for processes to map; what is there already of the same file is kept.

    Args:
        source: Folder with the ``.npz`` files.
        name: Of the data set.
        part: ``test``: all training samples, and the test set. ``validation``: training samples without a tenth
            (digits: a fifth) drawn at random, and that part.
        work: Folder to write to.

    Raises:
        DataError: There is no such file, or it does not hold what it should.
    """
    path = find(source, name)
    place = work / "data" / "-".join([name, part, *([] if path is None else [_version(path)])])
    if place.exists():
        return place
    if path is None:
        if name != "digits":
            raise DataError(
                f"{source} has no {FILES[name][0]}", hint="python -m benchmarks.learning.data makes it, see its --help"
            )
        arrays: Arrays = digits()
    else:
        with np.load(path) as stored:
            arrays = {key: stored[key] for key in ("x", "y", "xt", "yt") if key in stored.files}
    _check(arrays, str(path), CLASSES[name])
    if part == "validation":
        arrays = _split(arrays, _VALIDATION.get(name, 0.1))
    # Cells run side by side, so the folder gets its name when it is complete.
    place.parent.mkdir(parents=True, exist_ok=True)
    written = Path(tempfile.mkdtemp(dir=place.parent))
    for key, array in arrays.items():
        kind = np.float32 if key.startswith("x") else np.int64
        np.save(written / f"{key}.npy", np.ascontiguousarray(array, dtype=kind))
    try:
        written.rename(place)
    except OSError:  # another process was first
        shutil.rmtree(written)
    return place


def _version(path: Path) -> str:
    """Eight letters that change with the place, the size and the time of a file."""
    status = path.stat()
    described = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    return hashlib.sha256(described.encode()).hexdigest()[:8]


def _split(arrays: Arrays, fraction: float) -> Arrays:
    x, y = arrays["x"], arrays["y"]
    held = round(fraction * len(x))
    order = permutation(0, Purpose.HOLDOUT, 0, 0, len(x))
    out, kept = np.sort(order[:held]), np.sort(order[held:])
    return {"x": x[kept], "y": y[kept], "xt": x[out], "yt": y[out]}


def _check(arrays: Arrays, where: str, classes: int) -> None:
    missing = {"x", "y", "xt", "yt"} - set(arrays)
    if missing:
        raise DataError(f"{where} lacks {', '.join(sorted(missing))}", hint="it needs the arrays x y xt yt")
    for images, labels in (("x", "y"), ("xt", "yt")):
        shape = arrays[images].shape
        if len(shape) != 4 or shape[2:] != (_SIDE, _SIDE) or arrays[labels].shape != shape[:1]:
            raise DataError(f"{where}: {images} is {shape}, {labels} is {arrays[labels].shape}", hint="want Nx?x32x32")
        if not 0 <= arrays[labels].min() <= arrays[labels].max() < classes:
            raise DataError(f"{where}: the labels {labels} are not all from 0 to {classes - 1}")


def digits() -> Arrays:
    """Scikit-learn's digits enlarged to 32x32 and normalised: 1,437 to train, 360 to test."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = np.kron(images.reshape(-1, 1, 8, 8) / 16.0, np.ones((4, 4)))
    x = ((x - x.mean()) / x.std()).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[_DIGITS_TEST:], order[:_DIGITS_TEST]
    y = labels.astype(np.int64)
    return {"x": x[train], "y": y[train], "xt": x[test], "yt": y[test]}


def fashion_mnist(folder: Path) -> Arrays:
    """Fashion-MNIST from its IDX files, padded to 32x32.

    Raises:
        DataError: A file is missing or no IDX file.
    """

    def read(part: str, kind: str) -> NDArray[Any]:
        found = sorted(folder.glob(f"{part}-{kind}*"))
        if not found:
            raise DataError(f"{folder} has no {part}-{kind}*")
        return read_idx(found[0], 1024)

    def images(part: str) -> NDArray[np.float32]:
        x = np.pad(read(part, "images").astype(np.float32) / 255.0, ((0, 0), (2, 2), (2, 2)))
        return ((x - 0.2860) / 0.3530)[:, None].astype(np.float32)

    return {"x": images("train"), "y": read("train", "labels"), "xt": images("t10k"), "yt": read("t10k", "labels")}


def cifar(folder: Path, name: str) -> Arrays:
    """CIFAR-10 or CIFAR-100 from the files of the "python version". Unpickles them: use files that you trust.

    Raises:
        DataError: A file is missing.
    """

    def read(files: list[str]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        x, y = [], []
        for file in files:
            path = folder / file
            if not path.is_file():
                raise DataError(f"{folder} has no {file}")
            raw = path.read_bytes()
            stored = pickle.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw, encoding="bytes")
            x.append(np.asarray(stored[b"data"], np.uint8).reshape(-1, 3, _SIDE, _SIDE))
            y.append(np.asarray(stored[b"labels" if name == "cifar10" else b"fine_labels"], np.int64))
        mean, deviation = (np.array(v[name], np.float32)[:, None, None] for v in (_MEANS, _DEVIATIONS))
        return ((np.concatenate(x).astype(np.float32) / 255.0 - mean) / deviation), np.concatenate(y)

    train = [f"data_batch_{k}" for k in range(1, 6)] if name == "cifar10" else ["train"]
    x, y = read(train)
    xt, yt = read(["test_batch" if name == "cifar10" else "test"])
    return {"x": x, "y": y, "xt": xt, "yt": yt}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--fashion-mnist", type=Path, metavar="FOLDER", help="with its four IDX files")
    parser.add_argument("--cifar10", type=Path, metavar="FOLDER", help="with data_batch_1 to _5 and test_batch")
    parser.add_argument("--cifar100", type=Path, metavar="FOLDER", help="with train and test")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    made: dict[str, Arrays] = {"digits": digits()}
    if options.fashion_mnist is not None:
        made["fashion_mnist"] = fashion_mnist(options.fashion_mnist)
    for name in ("cifar10", "cifar100"):
        if getattr(options, name) is not None:
            made[name] = cifar(getattr(options, name), name)
    for name, arrays in made.items():
        np.savez(options.out / FILES[name][0], x=arrays["x"], y=arrays["y"], xt=arrays["xt"], yt=arrays["yt"])
        print(f"{name}: {len(arrays['x'])} to train, {len(arrays['xt'])} to test")


if __name__ == "__main__":
    main()
