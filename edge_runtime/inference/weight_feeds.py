"""The weights of an engine: the survivors that a caller writes, and what the graphs read.

Where removed weights are 0 both are one buffer. Where they keep their initial values (``fill`` is ``init``) the graphs
read all entries, and the survivors are put in their places before a run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...protocol.artifact.layout import initial_weights
from ...protocol.errors import ArtifactError
from ...protocol.perturbation.buffers import aligned_zeros
from ...protocol.pruning.mask import Mask

__all__ = ["WeightFeeds", "fed_bytes"]


class WeightFeeds:
    """Buffers that are bound to graphs once and changed in place.

    Args:
        mask: Which entries survive, and what the others are.
        seed: Of the initial weights.
        n_parameters: How many parameters, from the first one on, the graphs read; None for all.

    Attributes:
        survivors: ``float32[n_survivors]``, written by callers.
        inputs: ``w float32[n]``, ``index int32[n]`` and ``counts int64[n_parameters]`` by name of the graphs' input;
            ``n`` is the number of survivors, or of all entries when removed ones are not 0, of those parameters.
        filled: ``w`` if that is another buffer than ``survivors``, else None.
    """

    def __init__(self, mask: Mask, seed: int, n_parameters: int | None = None) -> None:
        self.survivors = aligned_zeros(mask.n_survivors)
        self.filled: NDArray[np.float32] | None = None
        shown = mask
        if mask.fill == "init" and mask.n_survivors < mask.layout.size:
            shown = Mask.dense(mask.layout)
            self.filled = aligned_zeros(mask.layout.size)
            np.copyto(self.filled, initial_weights(mask.layout, seed))
            self._places = np.flatnonzero(mask.kept)
        counts = np.ascontiguousarray(shown.counts(), dtype=np.int64)[:n_parameters]
        n_fed = int(counts.sum())
        self.inputs: dict[str, NDArray[Any]] = {
            "w": (self.survivors if self.filled is None else self.filled)[:n_fed],
            "index": np.ascontiguousarray(shown.index(), dtype=np.int32)[:n_fed],
            "counts": counts,
        }

    @property
    def n_fed(self) -> int:
        """Entries that the graphs read."""
        return int(self.inputs["w"].size)

    def check(self, weights: NDArray[np.float32]) -> None:
        """Whether a graph could run with these.

        Raises:
            ArtifactError: They are no ``float32[n_survivors]``.
        """
        if weights.shape != self.survivors.shape or weights.dtype != np.float32:
            raise ArtifactError(
                f"weights are {weights.dtype}{list(weights.shape)}, this mask needs float32[{self.survivors.size}]"
            )

    def write(self, weights: NDArray[np.float32]) -> None:
        """Let the graphs compute with ``weights float32[n_survivors]``, which may be :attr:`survivors` itself."""
        if weights is not self.survivors:
            np.copyto(self.survivors, weights)
        self.show()

    def show(self, first: int = 0) -> None:
        """Let the graphs see :attr:`survivors` from number ``first`` on."""
        if self.filled is not None:
            self.filled[self._places[first:]] = self.survivors[first:]


def fed_bytes(n_survivors: int, n_fed: int | None) -> int:
    """What the buffers take.

    Args:
        n_survivors: Survivors of the mask.
        n_fed: Entries that the graphs read where removed ones are not 0, else None.
    """
    return 8 * n_survivors if n_fed is None else 12 * n_survivors + 8 * n_fed
