"""scalar_rows: nothing is lost in a row, it has one encoding, and what a sketch sends takes two bytes a scalar."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedzo.protocol.errors import ProtocolError
from fedzo.protocol.perturbation.directions import round_coefficients
from fedzo.protocol.wire.scalar_rows import pack_row, round_to_halves, unpack_row

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
modest = st.floats(min_value=-(2.0**60), max_value=2.0**60, width=32)


@given(st.lists(floats, max_size=40))
def test_rows_come_back_bit_for_bit(values: list[float]) -> None:
    row = np.array(values, np.float32)
    data = pack_row(row)
    found, length = unpack_row(memoryview(data + b"more"), row.size)
    assert length == len(data)
    assert found.tobytes() == row.tobytes()
    assert not found.flags.writeable


@given(st.lists(modest, min_size=8, max_size=40))
@example([0.99999, 2.0**-24, *[0.0] * 6])
def test_rounded_rows_are_short_and_near(values: list[float]) -> None:
    row = np.array(values, np.float32)
    rounded = round_to_halves(row)
    assert round_to_halves(rounded).tobytes() == rounded.tobytes()
    assert len(pack_row(rounded)) == 1 + 2 * row.size
    # What is rounded up to a power of two doubles the steps near zero.
    largest = max(float(np.abs(row).max()), float(np.abs(rounded).max()))
    error = np.abs(rounded.astype(np.float64) - row.astype(np.float64))
    assert (error <= np.maximum(2.0**-11 * np.abs(row.astype(np.float64)), 2.0**-24 * largest) + 2.0**-110).all()


@pytest.mark.parametrize("first", [1.0 - 2.0**-20, -1e-12])
def test_a_row_stays_short_where_rounding_changes_the_exponent_or_the_sign_of_zero(first: float) -> None:
    row = np.array([first, 1e-4, 3e-8, 5e-8, 0.75, -0.5, 0.3, 0.0], np.float32)
    assert len(pack_row(round_to_halves(row))) == 1 + 2 * row.size


@given(st.lists(modest, min_size=8, max_size=40))
def test_coefficients_of_updates_take_three_bytes_at_most(values: list[float]) -> None:
    row = round_coefficients(np.array(values))
    data = pack_row(row)
    assert len(data) in (1 + 3 * row.size, 1 + 2 * row.size)
    found, length = unpack_row(memoryview(data), row.size)
    assert (found.tobytes(), length) == (row.tobytes(), len(data))


@given(st.binary(max_size=100), st.integers(0, 60))
def test_foreign_bytes_are_refused_or_are_what_they_say(data: bytes, count: int) -> None:
    try:
        found, length = unpack_row(memoryview(data), count)
    except ProtocolError:
        return
    assert pack_row(found) == data[:length]


@pytest.mark.parametrize(
    ("data", "count", "what"),
    [
        (b"", 0, "do not hold"),
        (b"\x00", 0, "not in its only encoding"),
        (b"\x80", 1, "do not hold"),
        (b"\x00" + bytes(2), 1, "only encoding"),  # too short for halves
        (b"\x05" + bytes(16), 8, "only encoding"),  # zeros have the exponent 0
        (b"\x80" + bytes(32), 8, "only encoding"),  # floats where halves do
        (b"\x81" + bytes(24), 8, "only encoding"),  # three bytes where two do
        (b"\x81" + b"\x01\x02\x03" * 7, 7, "only encoding"),  # too short for anything but floats
        (b"\x80" + b"\x00\x02\x03\x04" * 8, 8, "only encoding"),  # four bytes where three do
        (b"\x81" + b"\x01\x80\x7f" * 8, 8, "not finite"),
        (b"\x81" + bytes(23), 8, "do not hold"),
        (b"\x00" + b"\x00\x7c" * 8, 8, "not finite"),
        (b"\x00" + b"\x01\x7c" * 8, 8, "not finite"),  # a signalling NaN
        (b"\x7f" + b"\xff\x7b" * 8, 8, "not finite"),  # beyond float32
    ],
)
def test_other_encodings_are_refused_without_a_warning(data: bytes, count: int, what: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ProtocolError, match=what):
            unpack_row(memoryview(data), count)


@pytest.mark.parametrize("value", [np.nan, np.inf, 2.0**101])
def test_what_cannot_be_rounded_is_refused(value: float) -> None:
    with pytest.raises(ProtocolError, match="not finite or is larger"):
        round_to_halves(np.array([value, 1.0]))
