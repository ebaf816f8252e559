"""Directions, the fast Walsh-Hadamard transform, and sums of many directions."""

from __future__ import annotations

import fractions

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedzo.protocol.errors import ConfigError, ProtocolError
from fedzo.protocol.perturbation.directions import FAMILIES, Directions, Family, fwht, round_coefficients
from fedzo.protocol.perturbation.quantiles import gaussian_table
from fedzo.protocol.perturbation.streams import Purpose, permutation, raw_bytes, uint16s
from tests.protocol.builders import seeded_coefficients, seeded_normals


def hadamard_matrix(n: int) -> NDArray[np.int64]:
    """Sylvester's construction."""
    matrix = np.ones((1, 1), dtype=np.int64)
    while matrix.shape[0] < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def naive_fwht(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The butterfly order of the contract, one pair at a time."""
    out = [np.float32(v) for v in values]
    half = len(out) // 2
    while half >= 1:
        for j in range(len(out)):
            if not j & half:
                a, b = out[j], out[j + half]
                out[j], out[j + half] = a + b, a - b
        half //= 2
    return np.array(out, dtype=np.float32)


def direction(directions: Directions, round_: int, position: int) -> NDArray[np.float32]:
    return directions.direction(round_, position, np.empty(directions.size, dtype=np.float32))


@pytest.mark.parametrize("n", [1, 2, 4, 8, 64, 128, 256, 512, 1024, 4096])
def test_fwht_has_the_bits_of_the_naive_loop(n: int) -> None:
    values = seeded_normals(1, n, n) * np.float32(1.7)
    expected = naive_fwht(values)
    assert fwht(values) is values
    assert values.tobytes() == expected.tobytes()


@pytest.mark.parametrize("n", [1, 2, 16, 256, 1024])
def test_fwht_is_the_hadamard_matrix(n: int) -> None:
    values = np.rint(seeded_normals(2, n, n) * 100)
    expected = hadamard_matrix(n) @ values.astype(np.int64)
    assert np.array_equal(fwht(values.astype(np.float32)), expected)


def test_fwht_order_matters_and_is_the_stated_one() -> None:
    # In float32 2**24 + 1 is 2**24. Pairs n/2 apart meet first: (big, 1) and (-big, 0), then their sums.
    big = np.float32(2.0**24)
    values = np.array([big, -big, 1.0, 0.0], dtype=np.float32)
    assert fwht(values)[0] == np.float32(big + np.float32(1.0)) + np.float32(-big + np.float32(0.0)) == 0.0
    values = np.array([big, 1.0, -big, 0.0], dtype=np.float32)
    assert fwht(values)[0] == 1.0


@given(log_n=st.integers(0, 11), seed=st.integers(0, 2**32))
def test_fwht_is_linear_and_orthogonal_on_integers(log_n: int, seed: int) -> None:
    n = 1 << log_n
    a, b = (np.rint(seeded_normals(seed, k, n) * 50).astype(np.float32) for k in (0, 1))
    assert np.array_equal(fwht(a + b), fwht(a.copy()) + fwht(b.copy()))
    assert np.array_equal(fwht(fwht(a.copy())), n * a)


@pytest.mark.parametrize("n", [0, 3, 12, 1000])
def test_fwht_refuses_other_lengths(n: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        fwht(np.zeros(n, dtype=np.float32))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000, 1023, 1024, 1025, 2049])
def test_hadamard_direction_is_row_times_signs(size: int) -> None:
    directions = Directions("hadamard", 6, size)
    padded = directions.padded
    assert padded >= size > padded // 2 or size == padded == 1
    rows = permutation(6, Purpose.ROWS, 0, 0, padded)
    signs = 2.0 * np.unpackbits(raw_bytes(6, Purpose.SIGNS, 3, 0, size), bitorder="little")[:size] - 1.0
    for position in {0, 1, 5, padded - 1, padded, 3 * padded + 1}:
        row = int(rows[position % padded])
        expected = [signs[i] * (-1) ** (i & row).bit_count() for i in range(size)]
        assert direction(directions, 3, position).tolist() == expected


def test_hadamard_direction_of_a_large_size_at_sampled_entries() -> None:
    directions = Directions("hadamard", 1, 1 << 18)
    row = int(directions.rows(np.array([77]))[0])
    found = direction(directions, 0, 77) * directions._round_signs(0)
    for i in range(0, 1 << 18, 9_973):
        assert found[i] == (-1) ** (i & row).bit_count()


@pytest.mark.parametrize("bits", range(29))
def test_a_row_is_at_most_128_blocks_at_every_size(bits: int) -> None:
    directions = Directions("hadamard", 1, 1 << bits)
    assert directions._width & directions._width - 1 == 0
    assert directions.padded <= directions._width * 128


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 1000, 12_530])
def test_a_scaled_direction_has_the_bits_of_the_product(family: Family, size: int) -> None:
    directions, out = Directions(family, 4, size), np.empty(size, np.float32)
    for position in (0, 1, 5, 99):
        for scale in (np.float32(2.0**-10), np.float32(-0.3), np.float32(1.0)):
            expected = np.multiply(direction(directions, 2, position), scale)
            assert np.array_equal(directions.scaled(2, position, scale, out), expected)
    with pytest.raises(ProtocolError, match="position"):
        directions.scaled(0, -1, np.float32(1.0), out)


def test_gaussian_and_rademacher_read_their_own_stream() -> None:
    bits = uint16s(6, Purpose.DIRECTION, 3, 9, 100)
    assert np.array_equal(direction(Directions("gaussian", 6, 100), 3, 9), gaussian_table()[bits])
    signs = np.unpackbits(raw_bytes(6, Purpose.DIRECTION, 3, 9, 13), bitorder="little")[:100] * 2.0 - 1.0
    assert np.array_equal(direction(Directions("rademacher", 6, 100), 3, 9), signs)


@pytest.mark.parametrize("family", FAMILIES)
def test_directions_do_not_depend_on_what_was_asked_before(family: Family) -> None:
    used = Directions(family, 4, 333)
    for round_, position in [(0, 0), (5, 1), (0, 7), (5, 1), (2, 2)]:
        assert np.array_equal(
            direction(used, round_, position), direction(Directions(family, 4, 333), round_, position)
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_rounds_positions_and_seeds_give_other_directions(family: Family) -> None:
    base = direction(Directions(family, 4, 512), 0, 0)
    for seed, round_, position in [(5, 0, 0), (4, 1, 0), (4, 0, 1)]:
        other = direction(Directions(family, seed, 512), round_, position)
        assert abs(float(base.astype(np.float64) @ other)) < 0.3 * 512


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 5, 300])
def test_combine_is_the_sum_in_the_order_of_the_contract(family: Family, size: int) -> None:
    directions = Directions(family, 8, size)
    positions = np.array([0, 1, 4, 5, 6, 1_000, 70_000], dtype=np.int64)
    coefficients = seeded_coefficients(1, size, positions.size)
    found = directions.combine(2, positions, coefficients)
    assert found.dtype == np.float32
    assert found.shape == (size,)
    if family == "hadamard":
        spectrum = np.zeros(directions.padded, dtype=np.float32)
        for row, coefficient in zip(directions.rows(positions), coefficients, strict=True):
            spectrum[row] += coefficient
        expected = naive_fwht(spectrum)[:size] * directions._round_signs(2)
    else:
        expected = np.zeros(size, dtype=np.float32)
        for position, coefficient in zip(positions.tolist(), coefficients, strict=True):
            expected = expected + direction(directions, 2, position) * coefficient
    assert found.tobytes() == expected.tobytes()


@given(
    family=st.sampled_from(FAMILIES),
    size=st.integers(1, 700),
    raw=st.dictionaries(st.integers(0, 3_000), st.integers(-1000, 1000), min_size=1, max_size=12),
)
def test_combine_of_small_integers_is_the_exact_sum(family: Family, size: int, raw: dict[int, int]) -> None:
    directions = Directions(family, 21, size)
    positions = np.array(sorted(raw), dtype=np.int64)
    coefficients = np.array([raw[p] for p in positions.tolist()], dtype=np.float32)
    expected = np.zeros(size)
    for position, coefficient in zip(positions.tolist(), coefficients.tolist(), strict=True):
        expected += coefficient * direction(directions, 1, position).astype(np.float64)
    found = directions.combine(1, positions, coefficients)
    if family == "gaussian":
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-2)
    else:
        assert np.array_equal(found, expected)


def test_zero_coefficients_and_no_positions_change_nothing() -> None:
    for family in FAMILIES:
        directions = Directions(family, 8, 100)
        none = directions.combine(0, np.array([], dtype=np.int64), np.array([], dtype=np.float32))
        assert not none.any()
        some = directions.combine(0, np.array([1, 5]), np.array([0.0, 2.0], dtype=np.float32))
        assert np.array_equal(some, 2 * direction(directions, 0, 5))


def test_hadamard_rows_of_one_lap_are_orthogonal_and_complete() -> None:
    directions = Directions("hadamard", 3, 128)
    matrix = np.array([direction(directions, 0, k) for k in range(directions.n_positions)])
    assert np.array_equal(matrix @ matrix.T, 128 * np.eye(128))


@pytest.mark.parametrize(
    ("positions", "coefficients"),
    [([0, 1], [1.0]), ([1, 0], [1.0, 1.0]), ([3, 3], [1.0, 1.0]), ([-1, 0], [1.0, 1.0]), ([0, 1 << 62], [1.0, 1.0])],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_bad_positions_are_refused(family: Family, positions: list[int], coefficients: list[float]) -> None:
    with pytest.raises(ProtocolError):
        Directions(family, 0, 10).combine(0, np.array(positions), np.array(coefficients, dtype=np.float32))


@pytest.mark.parametrize("position", [-1, 1 << 62, 1 << 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_bad_position_of_a_direction_is_refused(family: Family, position: int) -> None:
    with pytest.raises(ProtocolError, match="position"):
        direction(Directions(family, 0, 10), 0, position)


@pytest.mark.parametrize(
    ("family", "seed", "size"),
    [("gauss", 0, 10), ("gaussian", -1, 10), ("gaussian", 1 << 64, 10), ("hadamard", 0, 0), ("hadamard", 0, 1 << 29)],
)
def test_bad_settings_are_refused(family: Family, seed: int, size: int) -> None:
    with pytest.raises(ConfigError):
        Directions(family, seed, size)


finite = st.floats(-(2.0**80), 2.0**80, allow_nan=False)


@settings(max_examples=300)
@given(value=finite)
def test_rounded_coefficients_are_the_nearest_with_thirteen_bits(value: float) -> None:
    rounded = float(round_coefficients(np.array([value]))[0])
    if abs(value) < 2.0**-100:
        assert rounded == 0.0 or abs(rounded) == 2.0**-100
        return
    exact, found = fractions.Fraction(value), fractions.Fraction(rounded)
    assert abs(found - exact) <= abs(exact) * fractions.Fraction(1, 2**13)
    mantissa = np.frexp(rounded)[0] * 2.0**13
    assert mantissa == np.rint(mantissa)
    assert round_coefficients(np.array([rounded]))[0] == np.float32(rounded)


@given(value=finite, entry=st.integers(0, 65_535))
def test_products_with_table_entries_are_exact(value: float, entry: int) -> None:
    coefficient = round_coefficients(np.array([value]))[0]
    product = fractions.Fraction(float(coefficient)) * fractions.Fraction(float(gaussian_table()[entry]))
    assert fractions.Fraction(float(coefficient * gaussian_table()[entry])) == product


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2.0**81, -1e300])
def test_impossible_coefficients_are_refused(value: float) -> None:
    with pytest.raises(ProtocolError):
        round_coefficients(np.array([1.0, value]))


@pytest.mark.parametrize("family", ["gaussian", "rademacher", "hadamard"])
def test_projections_are_inner_products(family: str) -> None:
    directions, values = Directions(family, 9, 77, block=2), seeded_normals(1, 0, 77)  # type: ignore[arg-type]
    positions = np.array([0, 3, 40])
    direction = np.empty(77, np.float32)
    wanted = [float(directions.direction(4, p, direction).astype(np.float64) @ values) for p in positions.tolist()]
    np.testing.assert_allclose(directions.project(4, positions, values), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gaussian", "rademacher", "hadamard"])
def test_blocks_have_directions_of_their_own(family: str) -> None:
    found = [Directions(family, 9, 64, block=b).direction(1, 5, np.empty(64, np.float32)) for b in range(4)]  # type: ignore[arg-type]
    for a in range(4):
        for b in range(a):
            assert abs(float(found[a] @ found[b])) < 40  # 64 if they were equal; sd 8
    with pytest.raises(ConfigError, match="block"):
        Directions(family, 9, 64, block=8)  # type: ignore[arg-type]
