"""Who holds which samples: one stored data set, and the rows of every virtual device."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..edge_runtime.datasets.arrays import member_names, read_npy, read_npz
from ..edge_runtime.datasets.data import Dataset, Samples, as_samples, load_dataset
from ..edge_runtime.datasets.partition import partition_dirichlet, partition_iid, partition_shards
from ..edge_runtime.datasets.samples import Conversion
from ..protocol.artifact.manifest import Manifest
from ..protocol.errors import ConfigError, DataError
from ..protocol.perturbation.streams import Purpose, permutation
from .settings import SimulationSettings, parse_split

__all__ = ["Clients", "Source", "StoredSamples", "load_clients", "load_test_set"]

Source = str | Path | tuple[NDArray[Any], ...]
"""What :func:`~fedzo.edge_runtime.datasets.data.load_dataset` reads, or arrays ``(x, y)`` or ``(x, y, client)``."""

_LIMIT_MIB = 8192


@dataclass(frozen=True, eq=False)
class Clients:
    """The data of all virtual devices.

    Attributes:
        samples: Everything.
        train: ``int64[n]`` for every device, rows that it trains on.
        test: ``int64[n]`` for every device, rows that it holds out.
    """

    samples: Samples
    train: list[NDArray[np.int64]]
    test: list[NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.train)

    def dataset(self, device: int) -> Dataset:
        """The samples of one device."""
        return Dataset(self.samples.subset(self.train[device]), self.samples.subset(self.test[device]))


def load_clients(source: Source, manifest: Manifest, settings: SimulationSettings, n_devices: int) -> Clients:
    """Load the data and deal them to the devices.

    Args:
        source: The data.
        manifest: Tells what samples look like.
        settings: Tell how they are dealt.
        n_devices: Virtual devices.

    Raises:
        DataError: The data cannot be used.
        ConfigError: They cannot be dealt so.
    """
    samples = _samples(source, manifest, settings)
    kind, number = parse_split(settings.split)
    labels = samples.labels
    if kind == "natural":
        parts = _natural(_client_numbers(source, settings, len(samples)), n_devices)
    elif kind == "dirichlet":
        parts = partition_dirichlet(labels, n_devices, number, settings.seed)
    elif kind == "shards":
        parts = partition_shards(labels, n_devices, settings.seed, shards_per_device=int(number))
    else:
        parts = partition_iid(len(samples), n_devices, settings.seed)
    train, test = [], []
    for part in parts:
        # As a device that has its part in a file of its own, see load_dataset.
        held = max(0, min(round(len(part) * settings.holdout), len(part) - 1))
        order = permutation(0, Purpose.HOLDOUT, 0, 0, len(part)) if held else np.arange(len(part))
        train.append(part[np.sort(order[held:])])
        test.append(part[np.sort(order[:held])])
    return Clients(samples, train, test)


def load_test_set(
    source: Source | None, data: Source, manifest: Manifest, settings: SimulationSettings
) -> Samples | None:
    """The server's own test set: what is given, else the test part of the data, if they have one.

    Raises:
        DataError: The data cannot be used.
    """
    if isinstance(source, tuple):
        return _samples(source, manifest, settings)
    place = source if source is not None else data
    if isinstance(place, tuple):
        return None
    dataset = _load(place, manifest, settings)
    if len(dataset.test):
        return dataset.test
    return dataset.train if source is not None else None


def _load(path: str | Path, manifest: Manifest, settings: SimulationSettings) -> Dataset:
    return load_dataset(
        path,
        manifest.input_shape,
        manifest.n_classes,
        mean=settings.mean or None,
        std=settings.std or None,
        pad=settings.pad,
        limit_mib=_LIMIT_MIB,
    )


def _samples(source: Source, manifest: Manifest, settings: SimulationSettings) -> Samples:
    if not isinstance(source, tuple):
        return _load(source, manifest, settings).train
    if len(source) not in (2, 3):
        raise DataError(f"{len(source)} arrays were given", hint="give (x, y), or (x, y, client)")
    return as_samples(
        source[0],
        source[1],
        manifest.input_shape,
        manifest.n_classes,
        mean=settings.mean or None,
        std=settings.std or None,
        pad=settings.pad,
    )


def _client_numbers(source: Source, settings: SimulationSettings, n_samples: int) -> NDArray[Any]:
    if settings.clients:
        found = read_npy(Path(settings.clients))
        where = settings.clients
    elif isinstance(source, tuple):
        if len(source) != 3:
            raise DataError("natural data need a client number a sample", hint="give (x, y, client)")
        found, where = source[2], "the array"
    else:
        path = Path(source)
        if path.suffix != ".npz" or "client" not in member_names(path):
            raise DataError(
                f"{path} does not say whose samples they are",
                hint="use a .npz file with an array `client`, or name a .npy file with --clients",
            )
        found, where = read_npz(path, ["client"], _LIMIT_MIB)["client"], str(path)
    if found.shape != (n_samples,) or found.dtype.kind not in "iuSU":
        raise DataError(
            f"{where}: the clients are {found.dtype}{list(found.shape)}, there are {n_samples} samples",
            hint="give one whole number a sample",
        )
    return found


def _natural(clients: NDArray[Any], n_devices: int) -> list[NDArray[np.int64]]:
    """One part a client, in the order of their numbers; the first ``n_devices`` of them."""
    names, owners = np.unique(clients, return_inverse=True)
    if n_devices > len(names):
        raise ConfigError(f"the data have {len(names)} clients, not {n_devices}", hint="use fewer devices")
    order = np.argsort(owners, kind="stable").astype(np.int64)
    ends = np.searchsorted(owners[order], np.arange(len(names) + 1))
    return [order[ends[k] : ends[k + 1]] for k in range(n_devices)]


@dataclass(frozen=True, eq=False)
class StoredSamples:
    """Samples as another process can map them: a file in place of the stored array.

    Attributes:
        path: File of the array.
        offset: Where its values begin; -1 for a ``.npy`` file.
        dtype: Of the values, as text.
        shape: Of the array.
        labels: See :class:`~fedzo.edge_runtime.datasets.samples.Samples`.
        conversion: See there.
        rows: See there.
    """

    path: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    labels: NDArray[np.integer[Any]] = field(repr=False)
    conversion: Conversion
    rows: NDArray[np.integer[Any]] | None = field(repr=False)

    @classmethod
    def of(cls, samples: Samples, folder: Path, name: str) -> StoredSamples:
        """Where samples lie; what lies in no file is written to ``folder``."""
        stored, labels, conversion, rows = samples.parts
        shape = tuple(stored.shape)
        if isinstance(stored, np.memmap) and stored.filename is not None and stored.flags.c_contiguous:
            place, offset = str(stored.filename), _file_offset(stored)
        else:
            np.save(folder / f"{name}.npy", stored)
            place, offset = str(folder / f"{name}.npy"), -1
        return cls(place, offset, stored.dtype.str, shape, labels, conversion, rows)

    def open(self) -> Samples:
        """Map the file."""
        if self.offset < 0:
            stored: NDArray[Any] = np.load(self.path, mmap_mode="r")
        else:
            stored = np.memmap(self.path, np.dtype(self.dtype), "r", self.offset, self.shape)
        return Samples(stored, self.labels, self.conversion, self.rows)


def _file_offset(stored: np.memmap[Any, Any]) -> int:
    """Where in its file a mapped array begins; a slice's own ``offset`` is that of the whole array."""
    mapping: Any = stored
    while isinstance(mapping, np.ndarray):
        mapping = mapping.base
    begin = int(stored.offset) // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    return begin + stored.ctypes.data - np.frombuffer(mapping, np.uint8).ctypes.data
