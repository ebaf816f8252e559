"""Scalars on the wire: a row of halves with one exponent, of short floats, or of float32 values, whatever is shortest.

A sketch needs no more than 11 bits of each of its scalars: what rounding takes away stays in the residual. Rounded
values are float32 like all others; only their encoding is shorter, and nothing is lost in it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import ProtocolError

__all__ = ["LARGEST", "ROW_PREFIX_BYTES", "pack_row", "round_to_halves", "unpack_row"]

ROW_PREFIX_BYTES = 1
_FLOATS = -128
"""In place of an exponent: the row has float32 values."""
_SHORT_FLOATS = -127
"""In place of an exponent: the row has float32 values without their lowest byte, which is zero in all of them.

So are the coefficients of an update, which have 13 significant bits.
"""
_SHORTEST = 8
"""Rows of fewer scalars stay as they are."""
_LEAST_EXPONENT, _LARGEST_EXPONENT = -90, 100
LARGEST = 2.0**_LARGEST_EXPONENT
"""What can be rounded to halves is smaller."""


def _exponent(values: NDArray[np.float64]) -> int:
    """The power of two above the largest magnitude, within limits; 0 for zeros."""
    largest = float(np.abs(values).max(initial=0.0))
    return max(_LEAST_EXPONENT, int(np.frexp(largest)[1])) if largest > 0.0 else 0


def _halves(values: NDArray[np.float64], exponent: int) -> NDArray[np.float16]:
    with np.errstate(over="ignore", under="ignore"):
        return np.ldexp(values, -exponent).astype(np.float16)


def round_to_halves(values: NDArray[np.float32] | NDArray[np.float64]) -> NDArray[np.float32]:
    """The nearest values that a short row can say: 11 significant bits, fewer far below the largest one.

    Args:
        values: ``float[n]``, finite, below ``2**100``.

    Returns:
        ``float32[n]``, owned by the caller.

    Raises:
        ProtocolError: A value is too large.
    """
    exact = values.astype(np.float64)
    exponent = _exponent(exact)
    if exponent > _LARGEST_EXPONENT or not np.isfinite(exact).all():
        raise ProtocolError("a scalar is not finite or is larger than 2**100", hint="lower the learning rate")
    halves = _halves(exact, exponent)
    if float(np.abs(halves).max(initial=0.0)) >= 1.0:  # rounded up to the next power: a row has the exponent of that
        exponent += 1
        halves = _halves(exact, exponent)
    # A negative zero would make the row a long one.
    rounded: NDArray[np.float32] = np.add(np.ldexp(halves.astype(np.float64), exponent), 0.0).astype(np.float32)
    return rounded


def pack_row(values: NDArray[np.float32]) -> bytes:
    """One row: an exponent and halves, or a mark and float32 values of three or four bytes; little-endian.

    Raises:
        ProtocolError: A value is not finite.
    """
    if values.ndim != 1 or not bool(np.isfinite(values).all()):
        raise ProtocolError("scalars must be one row of finite float32 values")
    exponent = _row_exponent(values)
    if exponent == _FLOATS:
        return _FLOATS.to_bytes(1, "little", signed=True) + values.astype("<f4", copy=False).tobytes()
    if exponent == _SHORT_FLOATS:
        upper = np.ascontiguousarray(_bytes_of(values)[:, 1:])
        return _SHORT_FLOATS.to_bytes(1, "little", signed=True) + upper.tobytes()
    return (
        exponent.to_bytes(1, "little", signed=True)
        + _halves(values.astype(np.float64), exponent).astype("<f2", copy=False).tobytes()
    )


def _bytes_of(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Little-endian, ``uint8[n, 4]``."""
    return np.ascontiguousarray(values, dtype="<f4").view(np.uint8).reshape(-1, 4)


def _row_exponent(values: NDArray[np.float32]) -> int:
    """What a row begins with: it follows from the values alone, so that they have one encoding.

    Halves say only values that end in 13 zero bits, so that most rows of losses are known not to be any at a glance.
    """
    if values.size < _SHORTEST or _bytes_of(values)[:, 0].any():
        return _FLOATS
    exact = values.astype(np.float64)
    exponent = _exponent(exact)
    if exponent > _LARGEST_EXPONENT or np.signbit(exact[exact == 0.0]).any():
        return _SHORT_FLOATS
    said = np.ldexp(_halves(exact, exponent).astype(np.float64), exponent)
    return exponent if np.array_equal(said, exact) else _SHORT_FLOATS


def unpack_row(raw: memoryview, count: int) -> tuple[NDArray[np.float32], int]:
    """One row of ``count`` scalars at the beginning of ``raw``.

    Returns:
        Read-only ``float32[count]``, and how many bytes it took.

    Raises:
        ProtocolError: There are fewer bytes, a value is not finite, or the row is not in its only encoding.
    """
    exponent = int.from_bytes(raw[:1], "little", signed=True)
    width = {_FLOATS: 4, _SHORT_FLOATS: 3}.get(exponent, 2)
    end = 1 + width * count
    if len(raw) < end:
        raise ProtocolError(f"{len(raw)} bytes do not hold a row of {count} scalars")
    if exponent == _FLOATS:
        out = np.frombuffer(raw[1:end], dtype="<f4").astype(np.float32)
    elif exponent == _SHORT_FLOATS:
        padded = np.zeros((count, 4), dtype=np.uint8)
        padded[:, 1:] = np.frombuffer(raw[1:end], dtype=np.uint8).reshape(count, 3)
        out = padded.view("<f4").reshape(count).astype(np.float32)
    else:
        with np.errstate(over="ignore", invalid="ignore"):  # foreign bytes: what is no number is refused below
            halves = np.frombuffer(raw[1:end], dtype="<f2").astype(np.float64)
            out = np.ldexp(halves, exponent).astype(np.float32)
    if not bool(np.isfinite(out).all()):
        raise ProtocolError("a scalar is not finite")
    if _row_exponent(out) != exponent:
        raise ProtocolError("a row of scalars is not in its only encoding")
    out.flags.writeable = False
    return out, end
