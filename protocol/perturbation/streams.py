"""Seeded random bits: one Philox4x64-10 stream for every (seed, purpose, round, index).

The counter carries the position, so any part of any stream is reached without state. Only the raw integer stream of
numpy's Philox is used: numpy guarantees it for ever ("a fixed seed will always produce the same random integer
stream"), while its normals differ between C libraries.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. numpy advances the counter before it
generates, so block 0 of a stream is Random123's block for counter ``[1, index, round, 0]``.
"""

from __future__ import annotations

import enum

import numpy as np
from numpy.random import Philox
from numpy.typing import NDArray

__all__ = ["Purpose", "permutation", "raw_bytes", "uint16s", "uint64s"]


class Purpose(enum.IntEnum):
    """What a stream is for; second half of the Philox key, so streams never overlap."""

    DIRECTION = 1
    SIGNS = 2
    ROWS = 3
    INIT = 4
    SALIENCY_INPUT = 5
    SALIENCY_DRAW = 6
    BATCH = 7
    SAMPLING = 8
    MASK = 9
    GOLDEN = 10
    HOLDOUT = 11
    NODE_NOISE = 12
    PARTICIPANTS = 13
    CHANCE = 14
    SCORE_CHECK = 15


def uint64s(seed: int, purpose: Purpose, round_: int, index: int, count: int) -> NDArray[np.uint64]:
    """The first ``count`` raw words of a stream.

    Args:
        seed: Run seed, ``0 <= seed < 2**64``.
        purpose: What the bits are for.
        round_: Round number, ``0 <= round_ < 2**64``.
        index: Position inside the round, ``0 <= index < 2**64``.
        count: Number of words.

    Returns:
        ``uint64[count]``, owned by the caller.

    Raises:
        OverflowError: A number is negative or needs more than 64 bits.
    """
    # Explicit uint64: numpy turns a list that mixes words above and below 2**63 into float64, which loses bits.
    key = np.array([seed, purpose], dtype=np.uint64)
    generator = Philox(key=key, counter=np.array([0, index, round_, 0], dtype=np.uint64))
    return np.asarray(generator.random_raw(count), dtype=np.uint64)


def raw_bytes(seed: int, purpose: Purpose, round_: int, index: int, count: int) -> NDArray[np.uint8]:
    """The first ``count`` bytes of a stream, words read little-endian: ``uint8[count]``."""
    words = uint64s(seed, purpose, round_, index, (count + 7) // 8)
    return words.astype("<u8", copy=False).view(np.uint8)[:count]


def uint16s(seed: int, purpose: Purpose, round_: int, index: int, count: int) -> NDArray[np.uint16]:
    """The first ``count`` 16-bit values of a stream, words read little-endian: ``uint16[count]``."""
    words = uint64s(seed, purpose, round_, index, (count + 3) // 4)
    values = words.astype("<u8", copy=False).view("<u2")[:count]
    return np.asarray(values, dtype=np.uint16)


def permutation(seed: int, purpose: Purpose, round_: int, index: int, count: int) -> NDArray[np.int64]:
    """A seeded permutation of ``range(count)``: stable argsort of the stream's words, ``int64[count]``."""
    return np.argsort(uint64s(seed, purpose, round_, index, count), kind="stable").astype(np.int64, copy=False)
