"""Values that are finite in the file and would not be at the network."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from fedzo.edge_runtime.datasets.data import as_samples
from fedzo.protocol.errors import ConfigError, DataError

Y = np.zeros(3, np.int64)


def _stored(dtype: str, *values: float) -> np.ndarray[Any, Any]:
    """Three samples of two channels, 2x2; the first values of the last sample."""
    x = np.zeros((3, 2, 2, 2), dtype)
    x[2].reshape(-1)[: len(values)] = values
    return x


@pytest.mark.parametrize(
    ("x", "mean", "std", "message"),
    [
        (_stored("<f4", 0, 3e38), None, (0.5,), r"sample 2 holds 3e\+38; .* mean 0 and divided by the std 0\.5 it"),
        (_stored("<f8", -3e38), (3e38,), None, r"sample 2 holds -3e\+38; minus the mean 3e\+38 and .* std 1 it"),
        (_stored("<f2", 1000.0), None, (1e-36,), r"sample 2 holds 1000; .* std 1e-36 it"),
        (_stored("<i8", 7), None, (1e-38,), r"sample 2 holds 7; .* std 1e-38 it"),
        (_stored("u1", 255), (-1e3,), (1e-36,), r"sample 0 holds 0; minus the mean -1000 and .* std 1e-36 it"),
        # The second channel is divided by less.
        (_stored("<f4", 9, 9, 9, 9, 9), (0.0, 1.0), (1.0, 2e-38), r"sample 2 holds 9; minus the mean 1 and .* 2e-38"),
    ],
)
def test_values_that_the_conversion_makes_infinite_are_refused(x: Any, mean: Any, std: Any, message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=message) as caught:
            as_samples(x, Y, (2, 2, 2), 2, mean=mean, std=std, where="d.npz")
    assert caught.value.message.startswith("d.npz: ")


@pytest.mark.parametrize(
    ("x", "mean", "std"),
    [
        (_stored("<f4", 3e38), None, (1.0,)),
        (_stored("<f4", 3e38), (0.0, 1.0), (1.0, 1e-3)),  # large values, but of the other channel
        (_stored("<i8", 7), None, (1e-30,)),  # the type holds larger ones
        (_stored("u1", 255), (0.5,), (1e-37,)),
    ],
)
def test_values_that_stay_finite_are_taken(x: Any, mean: Any, std: Any) -> None:
    batch = as_samples(x, Y, (2, 2, 2), 2, mean=mean, std=std).batch(np.arange(3))
    assert np.isfinite(batch.x).all()


def test_zeros_that_are_padded_count() -> None:
    x = np.full((3, 2, 2, 2), 1e38, np.float32)
    as_samples(x, Y, (2, 2, 2), 2, mean=(1e38,), std=(0.1,))
    with pytest.raises(DataError, match="sample 0 holds 0; minus the mean 1e"):
        as_samples(x, Y, (2, 4, 4), 2, mean=(1e38,), std=(0.1,), pad=True)


def test_a_std_without_a_finite_inverse_is_refused() -> None:
    with pytest.raises(ConfigError, match="std at least 1e-38"):
        as_samples(_stored("<f4"), Y, (2, 2, 2), 2, std=(1e-39,))
