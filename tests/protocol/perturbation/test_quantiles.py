"""The Gaussian table against the standard library's quantiles and its own digest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np
import pytest

from fedzo.protocol.errors import SelfTestError
from fedzo.protocol.perturbation import quantiles
from fedzo.protocol.perturbation.quantiles import TABLE_SIZE, gaussian_table


@pytest.fixture
def fresh_table() -> Iterator[None]:
    gaussian_table.cache_clear()
    yield
    gaussian_table.cache_clear()


def test_table_is_the_normal_distribution() -> None:
    exact = np.array([NormalDist().inv_cdf((i + 0.5) / TABLE_SIZE) for i in range(TABLE_SIZE)])
    exact /= math.sqrt(math.fsum(exact * exact) / TABLE_SIZE)
    np.testing.assert_allclose(gaussian_table(), exact, rtol=2.0**-11, atol=0)


def test_moments_of_the_table() -> None:
    table = gaussian_table().astype(np.float64)
    assert table.mean() == 0.0
    assert abs(np.mean(table**2) - 1.0) < 5e-6
    assert abs(np.mean(table**4) - 3.0) < 2e-3
    assert np.array_equal(table, -table[::-1])
    assert (np.diff(table) >= 0).all()
    assert (table != 0).all()


def test_entries_have_eleven_significant_bits_and_products_are_exact() -> None:
    table = gaussian_table()
    mantissa = np.frexp(table)[0] * 2.0**11
    assert np.array_equal(mantissa, np.rint(mantissa))
    coefficient = np.float32(8191 / 8192)  # thirteen bits, all set
    assert np.array_equal(table * coefficient, table.astype(np.float64) * float(coefficient))


def test_table_is_shared_and_read_only() -> None:
    table = gaussian_table()
    assert table is gaussian_table()
    with pytest.raises(ValueError, match="read-only"):
        table[0] = 0.0


@pytest.mark.usefixtures("fresh_table")
@pytest.mark.parametrize("name", ["FLOAT32_DIGEST", "FLOAT16_DIGEST"])
def test_a_machine_that_computes_another_table_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(quantiles, name, "0" * 64)
    with pytest.raises(SelfTestError, match="Gaussian table") as caught:
        gaussian_table()
    assert caught.value.hint


@pytest.mark.usefixtures("fresh_table")
def test_one_wrong_bit_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    values = quantiles._quantiles()
    values[12_345] *= 1.0 + 2.0**-23
    monkeypatch.setattr(quantiles, "_quantiles", lambda: values)
    with pytest.raises(SelfTestError):
        gaussian_table()
