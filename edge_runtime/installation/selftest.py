"""Known answers of everything that must be the same bits on every machine: streams, table, directions, replay.

The answers are those of the golden vectors of the protocol; a machine that gives others cannot take part in a run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...protocol.artifact.layout import Initialiser, Layout, Parameter, initial_weights
from ...protocol.errors import SelfTestError
from ...protocol.perturbation.blocks import whole_block
from ...protocol.perturbation.directions import FAMILIES, Directions, fwht, round_coefficients
from ...protocol.perturbation.quantiles import gaussian_table
from ...protocol.perturbation.streams import Purpose, permutation, uint16s, uint64s
from ...protocol.pruning.mask import threshold
from ...protocol.replay.optimisers import OptimiserConfig
from ...protocol.replay.update import Replica

__all__ = ["KNOWN_ANSWERS", "KnownAnswer", "keeps_denormals"]

REPLAY_UPDATES: Final = 1_000
_SURVIVORS, _POSITIONS = 2_003, 24
_HINT: Final = "this numpy computes other bits than the contract; reinstall numpy from an official wheel"


@dataclass(frozen=True, slots=True)
class KnownAnswer:
    """One computation and the answer that every machine must give.

    Attributes:
        name: What is computed.
        compute: Gives the answer of this machine.
        answer: The right one.
    """

    name: str
    compute: Callable[[], str]
    answer: str

    def check(self) -> str:
        """Compute it.

        Returns:
            The answer, which is the right one.

        Raises:
            SelfTestError: This machine computes another one.
        """
        found = self.compute()
        if found != self.answer:
            raise SelfTestError(f"{self.name} gives {found[:16]}, the contract says {self.answer[:16]}", hint=_HINT)
        return found


def philox() -> str:
    """Raw words of a stream, as hexadecimal numbers."""
    return "".join(f"{word:016x}" for word in uint64s(1, Purpose.DIRECTION, 2, 3, 4).tolist())


def row_order() -> str:
    """Digest of a seeded permutation of 16,384 rows."""
    return _digest(permutation(5, Purpose.ROWS, 0, 0, 16_384))


def table() -> str:
    """Digest of the table of normal quantiles."""
    return _digest(gaussian_table())


def hadamard() -> str:
    """Digest of the fast Walsh-Hadamard transform of 4,096 normals."""
    return _digest(fwht(_normals(1, 0, 4_096)))


def directions() -> str:
    """Digests of one direction of each family."""
    buffer = np.empty(5_001, dtype=np.float32)
    return "".join(_digest(Directions(family, 9, buffer.size).direction(4, 17, buffer))[:16] for family in FAMILIES)


def replay() -> str:
    """Weights digest after :data:`REPLAY_UPDATES` updates of Adam, two segments of Hadamard directions each."""
    layout = Layout((Parameter("w", (2 * _SURVIVORS,), True, Initialiser("normal", 0.125)),))
    mask = threshold(layout, np.abs(initial_weights(layout, 1)), 0.5)
    blocks = whole_block("hadamard", mask.n_survivors)
    replica = Replica(layout, mask, 1, 2, blocks, OptimiserConfig("adam", weight_decay=0.01))
    split = _POSITIONS // 3
    for index in range(REPLAY_UPDATES):
        first = index * (_POSITIONS + 1) % (blocks[0].n_positions - _POSITIONS - 1)
        segments = ((first, split), (first + split + 1, _POSITIONS - split))
        rate = float(np.float32(0.01) / np.float32(1 + index // 100))
        coefficients = round_coefficients(_normals(3, index, _POSITIONS).astype(np.float64) * 3.0)
        replica.prepare(index, index, rate, segments, coefficients)
    return replica.digest.hex()


KNOWN_ANSWERS: Final = (
    KnownAnswer("Philox", philox, "b921edce9f5b131e7bb96c0a711eb6eabe3f49450eba17e60c783fa14a10bd63"),
    KnownAnswer("row order", row_order, "cc4dbd5eac131277b40c39806b7e2a8540013fb7ac5c617996622d4fafb63495"),
    KnownAnswer("Gaussian table", table, "15474222c13431e0868dd2b0973cc3995f2283bb638597d01643e48df8f3b058"),
    KnownAnswer("Hadamard transform", hadamard, "def1835a2b74c06c2b9fb8dbe04f367b2629dbb4195e73361b2a4a0c9a4ade41"),
    KnownAnswer("directions", directions, "35a4bcac716902fed524f425e884aeb388d3aec7e786787a"),
    KnownAnswer(f"replay of {REPLAY_UPDATES:,} updates", replay, "4e684d6942d9fe4a8d8ed3f26e2a2c7c"),
)
"""In the order in which they build on each other."""


def keeps_denormals() -> bool:
    """Whether numpy computes with denormal numbers in this thread; 32-bit Arm flushes them to zero."""
    return bool((np.full(64, 1e-40, dtype=np.float32) * np.float32(0.5)).all())


def _normals(seed: int, index: int, count: int) -> NDArray[np.float32]:
    return np.take(gaussian_table(), uint16s(seed, Purpose.BATCH, 0, index, count), mode="clip")


def _digest(values: NDArray[Any]) -> str:
    return hashlib.sha256(values.astype(values.dtype.newbyteorder("<")).tobytes()).hexdigest()
