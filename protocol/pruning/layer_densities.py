"""Masks that are drawn: how many entries of each layer survive, and a seed that says which.

Such a mask travels as these numbers (:data:`HEADER_BYTES` and 4 a layer) instead of one bit an entry, and every side
draws it. Which entries of a layer survive hardly matters beside how many (Frankle et al., "Pruning neural networks at
initialization: why are we missing the mark?", ICLR 2021, section 5).

Sources: Mocanu et al., Nature Communications 9 (2018), and Evci et al., "Rigging the lottery", ICML 2020
(arXiv 1911.11134, section 3) for the densities of Erdős-Rényi kernels.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..artifact.layout import Layout, Parameter
from ..errors import ArtifactError, ConfigError, ProtocolError
from ..perturbation.streams import Purpose, uint64s
from .mask import Fill, Mask

__all__ = ["HEADER_BYTES", "LayerDensities", "check_floor", "erk_densities", "read_mask", "uniform_densities"]

_HEADER = struct.Struct("<4sI16sQ16s")
_MAGIC = b"FZD1"
HEADER_BYTES = _HEADER.size


@dataclass(frozen=True)
class LayerDensities:
    """How many entries of every maskable parameter survive, and which.

    Attributes:
        layout: The flat vector.
        seed: Of the draw.
        counts: Survivors of each maskable parameter, in the order of the layout.

    Raises:
        ArtifactError: There is not one count a maskable parameter, or one is impossible.
    """

    layout: Layout
    seed: int
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = [parameter.size for parameter in _layers(self.layout)]
        if len(self.counts) != len(sizes):
            raise ArtifactError(f"{len(self.counts)} layer densities for {len(sizes)} layers that can be pruned")
        if any(not 1 <= count <= size for count, size in zip(self.counts, sizes, strict=True)):
            raise ArtifactError(f"layers of {sizes} entries cannot keep {list(self.counts)}")
        if not 0 <= self.seed < 1 << 64:
            raise ArtifactError(f"the seed {self.seed} is no unsigned 64-bit number")

    def draw(self, fill: Fill = "zero") -> Mask:
        """The mask: of each layer the entries with the smallest of seeded words, the lower index among equals."""
        kept = np.ones(self.layout.size, dtype=np.bool_)
        remaining = iter(self.counts)
        for position, parameter in enumerate(self.layout.parameters):
            if parameter.maskable:
                kept[self.layout.slice_of(position)] = _smallest(
                    uint64s(self.seed, Purpose.MASK, 0, position, parameter.size), next(remaining)
                )
        return Mask(self.layout, kept, fill)

    def encode(self) -> bytes:
        """The bytes that travel.

        The header is ``FZD1``, the number of entries (u32), 16 bytes of the layout's digest, the seed (u64) and 16
        bytes of the mask's digest; then one count (u32) a maskable parameter; all little-endian.
        """
        header = _HEADER.pack(_MAGIC, self.layout.size, self.layout.digest[:16], self.seed, self.draw().digest[:16])
        return header + np.array(self.counts, dtype="<u4").tobytes()

    @classmethod
    def decode(cls, data: bytes, layout: Layout) -> LayerDensities:
        """Inverse of :meth:`encode`.

        Raises:
            ProtocolError: The bytes are no densities of ``layout``, or this machine draws another mask from them.
        """
        return _decoded(data, layout)[0]


def read_mask(data: bytes, layout: Layout, fill: Fill = "zero") -> Mask:
    """A mask in either form: its bits, or layer densities and a seed.

    Raises:
        ProtocolError: The bytes are no mask of ``layout``.
    """
    if data[: len(_MAGIC)] == _MAGIC:
        return _decoded(data, layout, fill)[1]
    return Mask.decode(data, layout, fill)


def _decoded(data: bytes, layout: Layout, fill: Fill = "zero") -> tuple[LayerDensities, Mask]:
    expected = _HEADER.size + 4 * len(_layers(layout))
    if len(data) != expected:
        raise ProtocolError(f"layer densities of this layout have {expected} bytes, not {len(data)}")
    magic, size, digest, seed, mask_digest = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise ProtocolError(f"the layer densities start with {magic!r}, not {_MAGIC!r}")
    if size != layout.size or digest != layout.digest[:16]:
        raise ProtocolError(f"the layer densities are for another layout: {size} entries, this one has {layout.size}")
    counts = np.frombuffer(data, dtype="<u4", offset=_HEADER.size).tolist()
    try:
        densities = LayerDensities(layout, seed, tuple(counts))
        mask = densities.draw(fill)
    except ArtifactError as error:
        raise ProtocolError(error.message, hint=error.hint) from None
    if mask.digest[:16] != mask_digest:
        raise ProtocolError(
            f"this machine draws the mask {mask.digest[:16].hex()}, the server has {mask_digest.hex()}",
            hint="run the self-test (fedzo-device doctor)",
        )
    return densities, mask


def _layers(layout: Layout) -> list[Parameter]:
    return [parameter for parameter in layout.parameters if parameter.maskable]


def _smallest(words: NDArray[np.uint64], count: int) -> NDArray[np.bool_]:
    """Marks the ``count`` smallest words, lower index first among equals: ``bool[n]``."""
    limit = np.partition(words, count - 1)[count - 1]
    kept = np.asarray(words <= limit)
    if (extra := int(np.count_nonzero(kept)) - count) > 0:
        kept[np.flatnonzero(words == limit)[-extra:]] = False
    return kept


def check_floor(layout: Layout, sparsity: float, floor: int) -> None:
    """Whether a mask of this sparsity can leave every layer ``floor`` survivors, or all that it has.

    Raises:
        ConfigError: It cannot.
    """
    wanted = layout.maskable_size - round(sparsity * layout.maskable_size)
    least = sum(min(floor, parameter.size) for parameter in _layers(layout))
    if least > wanted:
        raise ConfigError(
            f"a floor of {floor} survivors in {len(_layers(layout))} layers keeps {least} weights, the sparsity"
            f" {sparsity} only {wanted}",
            hint="lower the floor or the sparsity",
        )


def erk_densities(layout: Layout, sparsity: float, seed: int, floor: int = 1) -> LayerDensities:
    """Erdős-Rényi-kernel densities: proportional to the sum of a weight's dimensions over their product, at most 1.

    Raises:
        ConfigError: See :func:`check_floor`.
    """
    return _shared(layout, sparsity, seed, floor, [sum(p.shape) / p.size for p in _layers(layout)])


def uniform_densities(layout: Layout, sparsity: float, seed: int, floor: int = 1) -> LayerDensities:
    """The same density in every layer.

    Raises:
        ConfigError: See :func:`check_floor`.
    """
    return _shared(layout, sparsity, seed, floor, [1.0] * len(_layers(layout)))


def _shared(layout: Layout, sparsity: float, seed: int, floor: int, shares: list[float]) -> LayerDensities:
    """Counts in proportion to ``shares`` times sizes, between floor and size, whose sum is that of the sparsity.

    Layers that reach a bound keep it, and the others share the rest, as in the reference implementation of ERK.
    """
    check_floor(layout, sparsity, floor)
    sizes = [parameter.size for parameter in _layers(layout)]
    wanted = layout.maskable_size - round(sparsity * layout.maskable_size)
    weights = [share * size for share, size in zip(shares, sizes, strict=True)]
    low, high = 0.0, max(size / weight for size, weight in zip(sizes, weights, strict=True))

    def counts(scale: float) -> list[float]:
        return [min(max(scale * w, min(floor, n)), n) for w, n in zip(weights, sizes, strict=True)]

    # The sum grows with the scale: halving finds it whatever layers are at a bound.
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if math.fsum(counts(middle)) < wanted else (low, middle)
    exact = counts(high)
    whole = [math.floor(value) for value in exact]
    order = sorted(range(len(sizes)), key=lambda k: (whole[k] - exact[k], k))
    for k in order:
        if sum(whole) < wanted and whole[k] < sizes[k]:
            whole[k] += 1
    if sum(whole) != wanted:  # rounding of sums, by one or two entries
        k = max(range(len(sizes)), key=lambda k: sizes[k])
        whole[k] += wanted - sum(whole)
    return LayerDensities(layout, seed, tuple(whole))
