"""Where the entries of a parameter lie in a tensor that ONNX Runtime has rearranged for its kernels.

Convolutions on x86 read weights in blocks of 8 or 16 channels ("NCHWc", Liu et al., arXiv 1809.02697): each axis of
the parameter is cut into blocks, the blocks and the entries inside a block have strides of their own, and channels
that do not fill a block are padded with zeros. Plain, padded and transposed tensors are cases of the same rule.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import ArtifactError
from .layout import Layout

__all__ = ["PLACEMENTS_KEY", "BlockedAxis", "Placement", "decode_placements", "encode_placements"]

PLACEMENTS_KEY: Final = "fedzo.placements"
"""Metadata key of a graph under which its placements stand."""

_LARGEST_TENSOR = 1 << 31  # positions are int32


@dataclass(frozen=True, slots=True)
class BlockedAxis:
    """Coordinate ``c`` of one axis adds ``(c // block) * outer + (c % block) * inner`` to an entry's position.

    Attributes:
        block: Coordinates in a block, at least 1.
        outer: Distance of neighbouring blocks, in entries.
        inner: Distance of neighbours inside a block.
    """

    block: int
    outer: int
    inner: int


@dataclass(frozen=True, slots=True)
class Placement:
    """The place of one parameter in a flattened tensor.

    Attributes:
        size: Entries of the tensor, with padding.
        axes: One rule an axis of the parameter.
    """

    size: int
    axes: tuple[BlockedAxis, ...]

    def positions(self, shape: Sequence[int], index: NDArray[np.int32]) -> NDArray[np.int32]:
        """Positions in the tensor.

        Args:
            shape: Of the parameter, as many axes as the placement.
            index: ``int32[n]``, flat indices inside the parameter.

        Returns:
            ``int32[n]``, owned by the caller.
        """
        rest, total = index, np.zeros(index.size, np.int32)
        for extent, axis in zip(reversed(shape), reversed(self.axes), strict=True):
            rest, coordinate = np.divmod(rest, np.int32(extent))
            block, within = np.divmod(coordinate, np.int32(axis.block))
            np.add(total, np.multiply(block, axis.outer, dtype=np.int32), out=total)
            np.add(total, np.multiply(within, axis.inner, dtype=np.int32), out=total)
        return total


def encode_placements(placements: Mapping[str, Placement]) -> str:
    """Placements by parameter name as JSON: ``{name: [size, [block, outer, inner], ...]}``."""
    rows = {name: [p.size, *([a.block, a.outer, a.inner] for a in p.axes)] for name, p in placements.items()}
    return json.dumps(rows, sort_keys=True, separators=(",", ":"))


def decode_placements(text: str, layout: Layout) -> dict[str, Placement]:
    """Parse and check what :func:`encode_placements` wrote.

    Raises:
        ArtifactError: The text is malformed, names a parameter that ``layout`` lacks, or places an entry outside its
            tensor.
    """
    try:
        raw = json.loads(text)
        return {name: _placement(layout.parameters[layout.position_of(name)].shape, row) for name, row in raw.items()}
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ArtifactError(f"the placements of a graph are malformed: {error!r}", hint="export again") from None


def _placement(shape: tuple[int, ...], row: list[Any]) -> Placement:
    size, *axes = row
    numbers = [size, *(number for axis in axes for number in axis)]
    if any(type(number) is not int or not 0 <= number < _LARGEST_TENSOR for number in numbers):
        raise ValueError("a number is out of range")
    placement = Placement(size, tuple(BlockedAxis(*axis) for axis in axes))
    if len(axes) != len(shape) or any(axis.block < 1 for axis in placement.axes):
        raise ValueError(f"{len(axes)} axes for the shape {shape}")
    last = sum(
        (n - 1) // axis.block * axis.outer + min(n - 1, axis.block - 1) * axis.inner
        for n, axis in zip(shape, placement.axes, strict=True)
    )
    if last >= size or size < math.prod(shape):
        raise ValueError(f"a tensor of {size} entries is too small for the shape {shape}")
    return placement
