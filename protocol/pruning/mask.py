"""Which entries of the flat vector survive pruning: the mask, its bytes, and how scores become one."""

from __future__ import annotations

import functools
import hashlib
import struct
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..artifact.layout import Layout, initial_weights
from ..errors import ArtifactError, ConfigError, ProtocolError

__all__ = ["Fill", "Mask", "threshold"]

Fill = Literal["zero", "init"]
"""What a removed weight is: 0, or its initial value for good, so that the network stays dense and trains sparsely."""

_HEADER = struct.Struct("<4sI16s")
_MAGIC = b"FZM1"
_INDEX_STEP = 1 << 16


@dataclass(frozen=True, eq=False)
class Mask:
    """The kept entries of a layout.

    The surviving weights ``w float32[n_survivors]`` are the kept entries of the dense flat vector in ascending order.

    Attributes:
        layout: The flat vector.
        kept: ``bool[layout.size]``, copied at construction and read-only.
        fill: What the removed entries are. It does not travel with the mask: the run's settings say it.

    Raises:
        ArtifactError: ``kept`` has the wrong shape or type, removes an entry that is not maskable, or leaves a
            maskable parameter without a survivor.
    """

    layout: Layout
    kept: NDArray[np.bool_]
    fill: Fill = "zero"

    def __post_init__(self) -> None:
        kept = np.array(self.kept, copy=True)
        if kept.dtype != np.bool_ or kept.shape != (self.layout.size,):
            raise ArtifactError(f"a mask of {self.layout.size} booleans was expected, not {kept.dtype}{kept.shape}")
        for position, parameter in enumerate(self.layout.parameters):
            survivors = int(np.count_nonzero(kept[self.layout.slice_of(position)]))
            if not parameter.maskable and survivors != parameter.size:
                raise ArtifactError(f"the mask removes entries of {parameter.name!r}, which is not maskable")
            if survivors == 0:
                raise ArtifactError(f"the mask leaves no survivor in {parameter.name!r}")
        kept.setflags(write=False)
        object.__setattr__(self, "kept", kept)

    @classmethod
    def dense(cls, layout: Layout) -> Mask:
        """The mask that keeps everything."""
        return cls(layout, np.ones(layout.size, dtype=np.bool_))

    @functools.cached_property
    def n_survivors(self) -> int:
        """Number of kept entries, those that are not maskable included."""
        return int(np.count_nonzero(self.kept))

    @property
    def sparsity(self) -> float:
        """Removed fraction of the maskable entries; 0 when nothing is maskable."""
        maskable = self.layout.maskable_size
        return (self.layout.size - self.n_survivors) / maskable if maskable else 0.0

    def survivors(self) -> NDArray[np.int64]:
        """Ascending flat indices of the kept entries: ``int64[n_survivors]``, owned by the caller."""
        return np.flatnonzero(self.kept).astype(np.int64, copy=False)

    def index(self) -> NDArray[np.int32]:
        """The ``index`` feed of the graphs: each survivor's index inside its own parameter.

        Returns:
            ``int32[n_survivors]``, concatenated in layout order, owned by the caller.
        """
        index, done = np.empty(self.n_survivors, dtype=np.int32), 0
        for position, parameter in enumerate(self.layout.parameters):
            start = self.layout.slice_of(position).start
            for first in range(0, parameter.size, _INDEX_STEP):  # by the piece: indices are made with 8 bytes each
                stop = min(first + _INDEX_STEP, parameter.size)
                part = np.flatnonzero(self.kept[start + first : start + stop])
                np.add(part, first, out=index[done : done + part.size], casting="unsafe")
                done += part.size
        return index

    def counts(self) -> NDArray[np.int64]:
        """The ``counts`` feed of the graphs: survivors of each parameter, ``int64[n_parameters]``."""
        slices = (self.layout.slice_of(k) for k in range(len(self.layout.parameters)))
        return np.array([np.count_nonzero(self.kept[s]) for s in slices], dtype=np.int64)

    def filled(self, weights: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
        """The dense vector that the network computes with.

        Args:
            weights: ``float32[n_survivors]``.
            seed: Of the initial weights, from the manifest.

        Returns:
            ``float32[layout.size]``, owned by the caller.
        """
        if self.fill == "init":
            dense = initial_weights(self.layout, seed)
        else:
            dense = np.zeros(self.layout.size, dtype=np.float32)
        dense[self.kept] = weights
        return dense

    def _packed(self) -> bytes:
        return np.packbits(self.kept, bitorder="little").tobytes()

    @functools.cached_property
    def digest(self) -> bytes:
        """SHA-256 of the packed bits, 32 bytes. The compressed form may differ between zlib builds, this does not."""
        return hashlib.sha256(self._packed()).digest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return (self.layout, self.fill, self.digest) == (other.layout, other.fill, other.digest)

    def __hash__(self) -> int:
        return hash(self.digest)

    def encode(self) -> bytes:
        """The mask as bytes.

        The header is ``FZM1``, the number of entries (u32) and 16 bytes of the layout's digest, all little-endian;
        the body is one zlib stream of the bits, least significant first, padded with zeros to a byte.
        """
        header = _HEADER.pack(_MAGIC, self.layout.size, self.layout.digest[:16])
        return header + zlib.compress(self._packed(), 9)

    @classmethod
    def decode(cls, data: bytes, layout: Layout, fill: Fill = "zero") -> Mask:
        """Inverse of :meth:`encode`. Never inflates more than the layout needs, whatever ``data`` says.

        Raises:
            ProtocolError: The bytes are no mask of ``layout``.
        """
        if len(data) < _HEADER.size:
            raise ProtocolError(f"a mask of {len(data)} bytes is shorter than its header of {_HEADER.size}")
        magic, size, digest = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise ProtocolError(f"the mask starts with {magic!r}, not {_MAGIC!r}")
        if size != layout.size or digest != layout.digest[:16]:
            raise ProtocolError(f"the mask is for another layout: {size} entries, this one has {layout.size}")
        expected = (layout.size + 7) // 8
        inflater = zlib.decompressobj()
        try:
            packed = inflater.decompress(data[_HEADER.size :], expected + 1)
        except zlib.error as error:
            raise ProtocolError(f"the mask does not inflate: {error}") from None
        if len(packed) != expected or not inflater.eof or inflater.unused_data:
            raise ProtocolError(f"the mask's body is not exactly {expected} bytes of bits")
        bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), bitorder="little")
        if bits[layout.size :].any():
            raise ProtocolError("the mask's padding bits are not zero")
        try:
            return cls(layout, bits[: layout.size].astype(np.bool_), fill)
        except ArtifactError as error:
            raise ProtocolError(error.message, hint=error.hint) from None


def _sort_keys(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Integers in the order of the scores. Float comparisons flush denormals on some 32-bit Arm builds of numpy."""
    bits = scores.view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def threshold(
    layout: Layout, scores: NDArray[np.float32], sparsity: float, *, within: Mask | None = None, floor: int = 1
) -> Mask:
    """Keep the highest scores over all maskable entries.

    Exactly ``round(sparsity * maskable_size)`` entries are removed, unless the floors together need more survivors.
    Ties go to the lower index.

    Args:
        layout: The flat vector.
        scores: ``float32[layout.size]``; entries that are not maskable are ignored.
        sparsity: Fraction of the maskable entries to remove, ``0 <= sparsity < 1``.
        within: Only entries that this mask keeps can survive (for a schedule of growing sparsity).
        floor: Least number of survivors of each maskable parameter, as far as it (and ``within``) has that many.

    Raises:
        ConfigError: A score is not finite, the sparsity or the floor is out of range, or ``within`` keeps fewer
            entries than asked for.
    """
    scores = np.ascontiguousarray(scores, dtype=np.float32)
    if scores.shape != (layout.size,):
        raise ConfigError(f"{layout.size} scores were expected, not an array of shape {scores.shape}")
    if not 0.0 <= sparsity < 1.0:
        raise ConfigError(f"the sparsity {sparsity} is not in [0, 1)")
    if floor < 1:
        raise ConfigError(f"the floor of {floor} survivors is less than 1: a layer would collapse")
    maskable = layout.maskable()
    if not np.isfinite(scores[maskable]).all():
        bad = int(np.count_nonzero(~np.isfinite(scores[maskable])))
        raise ConfigError(
            f"{bad} of {layout.maskable_size} scores are not finite", hint="drop the reports they come from"
        )
    candidates = maskable if within is None else maskable & within.kept
    wanted = layout.maskable_size - round(sparsity * layout.maskable_size)
    available = int(np.count_nonzero(candidates))
    if available < wanted:
        raise ConfigError(f"the sparsity {sparsity} keeps {wanted} entries, but the mask before kept only {available}")

    keys = _sort_keys(scores)
    kept = ~maskable
    for position, parameter in enumerate(layout.parameters):
        if parameter.maskable:
            part = layout.slice_of(position)
            kept[part.start + _best(keys[part], candidates[part], floor)] = True
    missing = wanted - int(np.count_nonzero(kept & maskable))
    if missing > 0:
        kept[_best(keys, candidates & ~kept, missing)] = True
    return Mask(layout, kept)


def _best(keys: NDArray[np.int64], allowed: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    """Indices of the ``count`` highest allowed keys, lower index first among equals."""
    indices = np.flatnonzero(allowed)
    order = np.argsort(-keys[indices], kind="stable")
    return indices[order[:count]].astype(np.int64, copy=False)
