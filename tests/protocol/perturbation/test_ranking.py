"""ranking: every side ranks alike, what is large travels often, and each coordinate has its turn."""

from __future__ import annotations

import hashlib
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedzo.protocol.errors import ProtocolError
from fedzo.protocol.perturbation.ranking import CoordinateRanking


def advance(ranking: CoordinateRanking, sizes: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """One update that carries coordinates of the given sizes."""
    chosen = ranking.chosen(k)
    ranking.advance(sizes[chosen])
    return chosen


@given(size=st.integers(1, 200), k=st.integers(1, 200), seed=st.integers(0, 9), rounds=st.integers(0, 6))
def test_chosen_coordinates_are_distinct_ascending_and_of_the_block(size: int, k: int, seed: int, rounds: int) -> None:
    k = min(k, size)
    ranking, rng = CoordinateRanking(seed, size, 1), np.random.default_rng(seed)
    for _ in range(rounds + 1):
        chosen = advance(ranking, rng.standard_normal(size).astype(np.float32), k)
        assert len(chosen) == k
        assert (np.diff(chosen) > 0).all()
        assert chosen[0] >= 0
        assert chosen[-1] < size


def test_the_first_pass_has_an_order_of_the_seed_and_misses_nobody() -> None:
    orders = []
    for seed in (1, 2):
        ranking = CoordinateRanking(seed, 1000, 1)
        orders.append([tuple(advance(ranking, np.ones(1000, np.float32), 100).tolist()) for _ in range(15)])
        assert len(set(sum(orders[-1], ()))) == 1000
    assert orders[0] != orders[1]
    assert orders[0][0] != tuple(range(100))


def test_what_is_large_travels_more_often_and_everything_travels() -> None:
    size, k = 640, 16
    sizes = np.full(size, 0.01, np.float32)
    sizes[:64] = 1.0
    ranking, counts = CoordinateRanking(3, size, 1), np.zeros(size, np.int64)
    for _ in range(1000):
        counts[advance(ranking, sizes, k)] += 1
    assert counts.min() >= 3
    assert counts[:64].mean() > 4 * counts[64:].mean()


def test_a_coordinate_of_zeros_keeps_its_turn() -> None:
    ranking, seen = CoordinateRanking(3, 100, 0), set()
    for _ in range(40):
        seen |= set(advance(ranking, np.zeros(100, np.float32), 5).tolist())
    assert len(seen) == 100


def test_tiny_gradients_rank_without_a_warning() -> None:
    ranking, sizes = CoordinateRanking(3, 100, 0), np.full(100, 2.0**-90, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = {place for _ in range(30) for place in advance(ranking, sizes, 5).tolist()}
    assert len(seen) == 100


def test_two_sides_agree_and_a_state_goes_on_alike() -> None:
    rng = np.random.default_rng(0)
    one, other = CoordinateRanking(7, 300, 2), CoordinateRanking(7, 300, 2)
    for step in range(30):
        values = rng.standard_normal(300).astype(np.float32)
        if step == 11:
            other.restore(step, one.state())
        np.testing.assert_array_equal(advance(one, values, 20), advance(other, values, 20))
    assert one.state() == other.state()
    one.restart()
    np.testing.assert_array_equal(one.chosen(20), CoordinateRanking(7, 300, 2).chosen(20))


def test_a_round_without_coefficients_only_makes_older() -> None:
    ranking = CoordinateRanking(7, 50, 0)
    before = ranking.chosen(5).copy()
    ranking.advance(np.empty(0, np.float32))
    np.testing.assert_array_equal(ranking.chosen(5), before)


def test_ages_survive_the_end_of_their_counter() -> None:
    """Ages are differences modulo 2**32 sixteenths, so 2**28 rounds more are none."""
    one, other = CoordinateRanking(7, 64, 0), CoordinateRanking(7, 64, 0)
    other.restore((1 << 28) - 3, b"".join([other.state()[:256], _moved(other.state()[256:], -3 * 16)]))
    values = np.random.default_rng(1).standard_normal(64).astype(np.float32)
    for _ in range(20):
        np.testing.assert_array_equal(advance(one, values, 8), advance(other, values, 8))


def _moved(sent: bytes, sixteenths: int) -> bytes:
    """The same places of the counter, later."""
    return (np.frombuffer(sent, "<u4").astype(np.int64) + sixteenths).astype(np.uint32).tobytes()


def test_combine_puts_coefficients_in_their_places() -> None:
    ranking = CoordinateRanking(1, 20, 0)
    values = np.arange(1, 5, dtype=np.float32)
    dense = ranking.combine(9, np.arange(4), values)
    np.testing.assert_array_equal(dense[ranking.chosen(4)], values)
    assert np.count_nonzero(dense) == 4


@pytest.mark.parametrize("positions", [np.arange(1, 5), np.arange(21), np.array([0, 1, 3])], ids=str)
def test_other_positions_are_refused(positions: NDArray[np.int64]) -> None:
    with pytest.raises(ProtocolError, match="positions 0 to k - 1"):
        CoordinateRanking(1, 20, 0).combine(0, positions, np.ones(len(positions), np.float32))


@pytest.mark.parametrize("damage", [lambda s: s[:-1], lambda s: b"\xff" * 4 + s[4:], lambda s: b"\0\0\0\xc0" + s[4:]])
def test_damaged_states_are_refused(damage: object) -> None:
    ranking = CoordinateRanking(1, 20, 0)
    advance(ranking, np.ones(20, np.float32), 5)
    before = ranking.state()
    with pytest.raises(ProtocolError):
        ranking.restore(1, damage(before))  # type: ignore[operator]
    assert ranking.state() == before


def test_golden() -> None:
    """Every machine chooses the same: 200 updates of sizes over twelve orders of magnitude."""
    ranking = CoordinateRanking(11, 5_000, 1)
    exponents = np.arange(5_000) % 40 - 20
    sizes, digest = np.ldexp(np.float32(1.37), exponents).astype(np.float32), hashlib.sha256()
    for step in range(200):
        chosen = ranking.chosen(100 + step)
        digest.update(chosen.astype("<i8").tobytes())
        ranking.advance(sizes[chosen] * np.float32(1 + step % 3))
    digest.update(ranking.state())
    assert digest.hexdigest()[:32] == "143a6414c5b87ff344e3e81f3ee54751"
