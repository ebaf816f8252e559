"""The raw streams: Random123's Philox, addressed by (seed, purpose, round, index)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedzo.protocol.perturbation.streams import Purpose, permutation, raw_bytes, uint16s, uint64s

WORD = 2**64 - 1
words = st.one_of(st.integers(0, 1000), st.integers(0, WORD), st.sampled_from([2**63 - 1, 2**63, 2**63 + 1, WORD]))


def philox4x64(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x64-10 as Salmon et al. write it down, in Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c0, 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * c2, 2**64)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & WORD, (k1 + 0xBB67AE8584CAA73B) & WORD
    return c0, c1, c2, c3


def test_the_reference_gives_the_published_known_answers() -> None:
    # kat_vectors of Random123 1.09, philox4x64 10.
    zeros = (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B)
    ones = (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0)
    assert philox4x64((0, 0, 0, 0), (0, 0)) == zeros
    assert philox4x64((WORD, WORD, WORD, WORD), (WORD, WORD)) == ones


@given(seed=words, purpose=st.sampled_from(list(Purpose)), round_=words, index=words)
def test_streams_are_philox_blocks_from_counter_one(seed: int, purpose: Purpose, round_: int, index: int) -> None:
    expected = [w for block in (1, 2) for w in philox4x64((block, index, round_, 0), (seed, int(purpose)))]
    assert uint64s(seed, purpose, round_, index, 8).tolist() == expected


@pytest.mark.parametrize("arguments", [(-1, 0, 0), (2**64, 0, 0), (0, -1, 0), (0, 2**64, 0), (0, 0, 2**64)])
def test_numbers_outside_64_bits_are_refused(arguments: tuple[int, int, int]) -> None:
    seed, round_, index = arguments
    with pytest.raises(OverflowError):
        uint64s(seed, Purpose.INIT, round_, index, 1)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 17])
def test_every_view_is_the_same_little_endian_bytes(count: int) -> None:
    address = (3, Purpose.BATCH, 5, 7)
    whole = b"".join(int(w).to_bytes(8, "little") for w in uint64s(*address, 20))
    assert raw_bytes(*address, count).tobytes() == whole[:count]
    halves = uint16s(*address, count)
    assert halves.dtype == np.uint16
    assert halves.tolist() == [int.from_bytes(whole[2 * i : 2 * i + 2], "little") for i in range(count)]


def test_streams_do_not_overlap() -> None:
    addresses = itertools.product((0, 1, 2**63), (Purpose.DIRECTION, Purpose.SIGNS), (0, 1, 2), (0, 1, 2))
    blocks = [uint64s(seed, purpose, round_, index, 64) for seed, purpose, round_, index in addresses]
    assert np.unique(np.concatenate(blocks)).size == 64 * len(blocks)


@pytest.mark.parametrize("count", [1, 2, 16, 1000])
def test_permutation_is_the_order_of_the_words(count: int) -> None:
    values = uint64s(9, Purpose.ROWS, 1, 2, count).tolist()
    assert permutation(9, Purpose.ROWS, 1, 2, count).tolist() == sorted(range(count), key=values.__getitem__)
