"""The Gaussian table: 65,536 normal quantiles, computed at start and checked against a digest.

Sixteen random bits index the table. Entry ``i`` is the standard normal quantile of ``(i + 0.5) / 65536``, scaled to
unit variance and rounded to float16, so that it has 11 significant bits. Together with coefficients of 13 bits (see
:mod:`.directions`) every product is exact in float32, and a fused multiply-add gives the same bits as two steps.

Only ``+ - * /``, ``sqrt`` and ``frexp`` are used, one numpy call each: those agree on every CPU, numpy and C library,
where ``exp``, ``log`` and library normals do not.

Source: Wichura, "Algorithm AS 241: the percentage points of the normal distribution", Applied Statistics 37 (1988),
routine PPND16.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math

import numpy as np
from numpy.typing import NDArray

from ..errors import SelfTestError

__all__ = ["FLOAT16_DIGEST", "FLOAT32_DIGEST", "TABLE_SIZE", "gaussian_table"]

TABLE_SIZE = 1 << 16
FLOAT32_DIGEST = "8babbcaf96568f10165a1eab530c0e5c92d04de96761b6dbb3dadfa94baba37f"
FLOAT16_DIGEST = "92454c47fb0e04dfdd103cdcfa9ca1f5afae5b4c9c2c078715adb1dd130e21f2"

_Float64s = NDArray[np.float64]

# Numerator and denominator of the centre, |p - 0.5| <= 0.425, lowest power first.
_CENTRE = (
    (
        3.3871328727963666080e0,
        1.3314166789178437745e2,
        1.9715909503065514427e3,
        1.3731693765509461125e4,
        4.5921953931549871457e4,
        6.7265770927008700853e4,
        3.3430575583588128105e4,
        2.5090809287301226727e3,
    ),
    (
        1.0,
        4.2313330701600911252e1,
        6.8718700749205790830e2,
        5.3941960214247511077e3,
        2.1213794301586595867e4,
        3.9307895800092710610e4,
        2.8729085735721942674e4,
        5.2264952788528545610e3,
    ),
)
# The tail, sqrt(-log(p)) <= 5, which covers 0.5 / 65536. The paper's far tail is never reached.
_TAIL = (
    (
        1.42343711074968357734e0,
        4.63033784615654529590e0,
        5.76949722146069140550e0,
        3.64784832476320460504e0,
        1.27045825245236838258e0,
        2.41780725177450611770e-1,
        2.27238449892691845833e-2,
        7.74545014278341407640e-4,
    ),
    (
        1.0,
        2.05319162663775882187e0,
        1.67638483018380384940e0,
        6.89767334985100004550e-1,
        1.48103976427480074590e-1,
        1.51986665636164571966e-2,
        5.47593808499534494600e-4,
        1.05075007164441684324e-9,
    ),
)
_LOG_2 = 0.6931471805599453
_LOG_TERMS = 20


def _horner(coefficients: tuple[float, ...], x: _Float64s) -> _Float64s:
    out = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        out = np.add(np.multiply(out, x), coefficient)
    return out


def _log(x: _Float64s) -> _Float64s:
    """Natural logarithm: ``2 atanh((m - 1) / (m + 1)) + e log 2`` with ``m`` in ``[sqrt(1/2), sqrt(2))``."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < math.sqrt(0.5)
    mantissa = np.where(low, np.multiply(mantissa, 2.0), mantissa)
    exponent = np.subtract(exponent, low).astype(np.float64)
    t = np.divide(np.subtract(mantissa, 1.0), np.add(mantissa, 1.0))
    odd = _horner(tuple(1.0 / (2 * k + 1) for k in range(_LOG_TERMS + 1)), np.multiply(t, t))
    return np.add(np.multiply(np.multiply(2.0, t), odd), np.multiply(exponent, _LOG_2))


def _quantiles() -> _Float64s:
    """The table in float64, scaled to unit variance: ``float64[65536]``."""
    p = np.divide(np.add(np.arange(TABLE_SIZE // 2, dtype=np.float64), 0.5), float(TABLE_SIZE))
    q = np.subtract(p, 0.5)
    r = np.subtract(0.180625, np.multiply(q, q))
    centre = np.divide(np.multiply(q, _horner(_CENTRE[0], r)), _horner(_CENTRE[1], r))
    r = np.subtract(np.sqrt(np.negative(_log(p))), 1.6)
    tail = np.negative(np.divide(_horner(_TAIL[0], r), _horner(_TAIL[1], r)))
    lower = np.where(np.abs(q) <= 0.425, centre, tail)
    table = np.concatenate([lower, np.negative(lower[::-1])])
    # The sum is exact, whatever the order; in parts, as a list of all floats would leave 2 MiB in a small process.
    squares = np.multiply(table, table).reshape(-1, 1024)
    variance = math.fsum(itertools.chain.from_iterable(map(np.ndarray.tolist, squares))) / TABLE_SIZE
    return np.asarray(np.divide(table, math.sqrt(variance)), dtype=np.float64)


@functools.lru_cache(maxsize=1)
def gaussian_table() -> NDArray[np.float32]:
    """The table of normal quantiles, computed and checked at the first call.

    Returns:
        ``float32[65536]``, ascending, with 11 significant bits; read-only and shared by all callers.

    Raises:
        SelfTestError: This machine computed another table than the contract's.
    """
    wide = _quantiles().astype("<f4")
    narrow = wide.astype("<f2")
    for name, data, expected in (("float32", wide, FLOAT32_DIGEST), ("float16", narrow, FLOAT16_DIGEST)):
        found = hashlib.sha256(data.tobytes()).hexdigest()
        if found != expected:
            raise SelfTestError(
                f"the {name} Gaussian table has the digest {found[:16]}, the contract says {expected[:16]}",
                hint="this numpy build does not follow IEEE 754 here; reinstall numpy from an official wheel",
            )
    table = narrow.astype(np.float32)
    table.setflags(write=False)
    return table
