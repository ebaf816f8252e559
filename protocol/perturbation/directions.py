"""Perturbation directions from ``(run seed, round, position)``, bit for bit the same on every machine.

Three families. ``gaussian`` and ``rademacher`` draw one Philox stream a direction. ``hadamard`` takes row ``r`` of
the Walsh-Hadamard matrix, ``(-1)**popcount(i & r)`` at entry ``i``, times one seeded sign vector a round: directions
of a round are orthogonal (up to the padding to a power of two), and any number of them is summed with their
coefficients by one fast transform.

A coefficient has 13 significant bits and a table value 11, so each product is exact in float32 and only the order
of additions matters. That order is part of the contract: see :func:`fwht` and :meth:`Directions.combine`.

Sources: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023 (the random-seed trick);
Fino and Algazi, "Unified matrix treatment of the fast Walsh-Hadamard transform", IEEE Trans. Comput. 25 (1976).
"""

from __future__ import annotations

import functools
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, ProtocolError
from .buffers import aligned_zeros
from .quantiles import gaussian_table
from .streams import Purpose, permutation, raw_bytes, uint16s

__all__ = [
    "FAMILIES",
    "MAX_BLOCKS",
    "Directions",
    "Family",
    "fwht",
    "n_positions",
    "random_signs",
    "round_coefficients",
]

Family = Literal["gaussian", "rademacher", "hadamard"]
FAMILIES: Final[tuple[Family, ...]] = get_args(Family)

COEFFICIENT_BITS: Final = 13
SMALLEST_COEFFICIENT: Final = 2.0**-100
LARGEST_COEFFICIENT: Final = 2.0**80
MAX_POSITION: Final = 1 << 60
MAX_BLOCKS: Final = 8  # positions of all blocks, one behind the other, fill 63 bits
_BLOCK: Final = 256
_SHORT: Final = 128


def round_coefficients(coefficients: NDArray[np.float64]) -> NDArray[np.float32]:
    """Coefficients as they travel: 13 significant bits, magnitudes below ``2**-100`` set to zero.

    Only the server calls this; devices replay the float32 bits that it sends.

    Args:
        coefficients: ``float64[n]``.

    Returns:
        ``float32[n]``, owned by the caller.

    Raises:
        ProtocolError: A coefficient is not finite or larger than ``2**80``.
    """
    values = np.asarray(coefficients, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        if not (np.abs(values) <= LARGEST_COEFFICIENT).all():
            raise ProtocolError("a coefficient is not finite or is larger than 2**80", hint="lower the learning rate")
    mantissa, exponent = np.frexp(values)
    mantissa = np.rint(np.multiply(mantissa, 2.0**COEFFICIENT_BITS))
    rounded = np.ldexp(mantissa, exponent - COEFFICIENT_BITS)
    rounded[np.abs(rounded) < SMALLEST_COEFFICIENT] = 0.0
    return np.asarray(rounded, dtype=np.float32)


def random_signs(seed: int, purpose: Purpose, round_: int, index: int, out: NDArray[np.float32]) -> NDArray[np.float32]:
    """Fill ``out float32[n]`` with seeded signs, one bit each, least significant first: 1 is +1 and 0 is -1."""
    data = raw_bytes(seed, purpose, round_, index, (out.size + 7) // 8)
    out[:] = np.unpackbits(data, count=out.size, bitorder="little")
    np.multiply(out, np.float32(2.0), out=out)
    np.subtract(out, np.float32(1.0), out=out)
    return out


def fwht(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Fast Walsh-Hadamard transform in natural order, in place: ``out[i] = sum_r (-1)**popcount(i & r) values[r]``.

    The order of the additions is part of the contract: stages with half-length ``h = n/2, n/4, ..., 1``, where a
    stage replaces each pair ``(a, b) = (values[j], values[j + h])``, ``j & h == 0``, by ``(a + b, a - b)`` in float32.

    Args:
        values: ``float32[n]``, contiguous, ``n`` a power of two; overwritten with the result.

    Returns:
        ``values``.
    """
    n = values.size
    if n & (n - 1) or n == 0:
        raise ValueError(f"{n} is no power of two")
    block = min(_BLOCK, n)
    source, target = values, np.empty_like(values)
    half = n // 2
    while half >= block:
        _stage(source, target, half)
        source, target = target, source
        half //= 2
    # Short half-lengths would be short inner loops: with the blocks transposed, the same pairs lie in long rows.
    rows = n // block
    if rows > 1:
        np.copyto(target.reshape(block, rows), source.reshape(rows, block).T)
        source, target = target, source
    while half >= 1:
        _stage(source, target, half * rows)
        source, target = target, source
        half //= 2
    if rows > 1:
        np.copyto(target.reshape(rows, block), source.reshape(block, rows).T)
        source = target
    if source is not values:
        np.copyto(values, source)
    return values


def _stage(source: NDArray[np.float32], target: NDArray[np.float32], half: int) -> None:
    pairs, out = source.reshape(-1, 2, half), target.reshape(-1, 2, half)
    np.add(pairs[:, 0], pairs[:, 1], out=out[:, 0])
    np.subtract(pairs[:, 0], pairs[:, 1], out=out[:, 1])


@functools.lru_cache(maxsize=1)
def _short_pairs() -> NDArray[np.float32]:
    """Each row of the Walsh-Hadamard matrix of order 128, as it is and negated: ``float32[128, 2, 128]``."""
    rows = np.ones((1, 1), np.float32)
    while len(rows) < _SHORT:  # Sylvester's construction
        rows = np.block([[rows, rows], [rows, -rows]])
    return np.stack([rows, -rows], axis=1)


@functools.lru_cache(maxsize=1)
def _negated() -> NDArray[np.intp]:
    """1 where the matrix of order 128 is negative, as indices: ``intp[128, 128]``."""
    return (_short_pairs()[:, 0] < 0).astype(np.intp)


def _walsh_pair(row: int, width: int) -> NDArray[np.float32]:
    """The first ``width`` entries of a Walsh-Hadamard row, as they are and negated: ``float32[2, width]``, read only.

    A row is the Kronecker product of short rows, one for every seven of its bits.
    """
    pair: NDArray[np.float32] = _short_pairs()[row % _SHORT]
    while pair.shape[1] < width:
        row //= _SHORT
        blocks = min(width // pair.shape[1], _SHORT)
        column = _short_pairs()[row % _SHORT, 0, :blocks, np.newaxis]
        pair = np.multiply(column, pair[:, np.newaxis]).reshape(2, -1)
    return pair if pair.shape[1] == width else pair[:, :width]


def n_positions(family: Family, size: int) -> int:
    """After how many positions directions of ``size`` entries repeat: the padded size for ``hadamard``, else never."""
    return 1 << (size - 1).bit_length() if family == "hadamard" else MAX_POSITION


def _check_position(position: int) -> None:
    if not 0 <= position < MAX_POSITION:
        raise ProtocolError(f"the position {position} is not in [0, 2**60)")


class Directions:
    """The directions of one run, or of one block of its weights. Not thread-safe: it keeps the signs of the last round.

    Args:
        family: ``gaussian``, ``rademacher`` or ``hadamard``.
        seed: Run seed, ``0 <= seed < 2**64``.
        size: Number of entries of a direction, the mask's survivors.
        block: Which block of the weights, below :data:`MAX_BLOCKS`; each has streams of its own.

    Raises:
        ConfigError: The family is unknown, or a number is out of range.
    """

    def __init__(self, family: Family, seed: int, size: int, block: int = 0) -> None:
        if family not in FAMILIES:
            raise ConfigError(f"the direction family {family!r} is not one of {', '.join(FAMILIES)}")
        if not 0 <= seed < 1 << 64:
            raise ConfigError(f"the run seed {seed} is not an unsigned 64-bit number")
        if not 1 <= size <= 1 << 28:
            raise ConfigError(f"a direction of {size} entries is not in [1, 2**28]")
        if not 0 <= block < MAX_BLOCKS:
            raise ConfigError(f"the block {block} is not in [0, {MAX_BLOCKS})")
        self.family: Final = family
        self.seed: Final = seed
        self.size: Final = size
        self.block: Final = block
        self.padded: Final = n_positions("hadamard", size)
        self._width = max(1, self.padded // _SHORT)
        self._blocks = -(-size // self._width)
        self._signs = np.empty(0, dtype=np.float32)
        self._row = np.empty(0, dtype=np.float32)
        self._row_blocks = np.empty((0, self._width), dtype=np.float32)
        self._signs_of: tuple[int, float] = (-1, 1.0)

    @property
    def n_positions(self) -> int:
        """After how many positions the directions repeat: the padded size for ``hadamard``, else ``2**60``."""
        return n_positions(self.family, self.size)

    def _stream(self, position: int) -> int:
        return self.block * MAX_POSITION + position

    @functools.cached_property
    def _rows(self) -> NDArray[np.uint32]:
        return permutation(self.seed, Purpose.ROWS, 0, self.block, self.padded).astype(np.uint32)

    def _round_signs(self, round_: int, scale: float = 1.0) -> NDArray[np.float32]:
        """The signs of a round times ``scale``; made anew when either changes."""
        if self._signs_of != (round_, scale):
            if self._signs.size != self.size:
                self._signs = aligned_zeros(self.size)
            random_signs(self.seed, Purpose.SIGNS, round_, self.block, self._signs)
            if scale != 1.0:
                np.multiply(self._signs, np.float32(scale), out=self._signs)
            self._signs_of = round_, scale
        return self._signs

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Hadamard rows at ``positions``: one seeded permutation of all rows, walked again and again."""
        return self._rows[positions % self.padded].astype(np.int64)

    def direction(self, round_: int, position: int, out: NDArray[np.float32]) -> NDArray[np.float32]:
        """Write one direction into ``out float32[size]``, which stays the caller's; entries have unit variance.

        Raises:
            ProtocolError: The position is out of range.
        """
        _check_position(position)
        if self.family == "gaussian":
            bits = uint16s(self.seed, Purpose.DIRECTION, round_, self._stream(position), self.size)
            return np.take(gaussian_table(), bits, out=out, mode="clip")
        if self.family == "rademacher":
            return random_signs(self.seed, Purpose.DIRECTION, round_, self._stream(position), out)
        return self._hadamard(round_, position, 1.0, out)

    def scaled(self, round_: int, position: int, scale: np.float32, out: NDArray[np.float32]) -> NDArray[np.float32]:
        """Write ``scale`` times one direction into ``out``: the same bits as a product after :meth:`direction`.

        For ``hadamard`` it costs no more than the direction as long as the scale stays, and least if ``out`` begins on
        a cache line.

        Raises:
            ProtocolError: The position is out of range.
        """
        if self.family != "hadamard":
            return np.multiply(self.direction(round_, position, out), scale, out=out)
        _check_position(position)
        return self._hadamard(round_, position, float(scale), out)

    def _hadamard(self, round_: int, position: int, scale: float, out: NDArray[np.float32]) -> NDArray[np.float32]:
        # Entry i = block * width + low: a row repeats one short row, as it is or negated. All factors but the scale are
        # signs, so the order of the products is free; copies of whole blocks are the quickest.
        if not self._row.size:
            padded = aligned_zeros(self._blocks * self._width)
            self._row, self._row_blocks = padded[: self.size], padded.reshape(self._blocks, self._width)
        row = int(self._rows[position % self.padded])
        negated = _negated()[row // self._width][: self._blocks]
        _walsh_pair(row % self._width, self._width).take(negated, 0, self._row_blocks, "clip")
        return np.multiply(self._row, self._round_signs(round_, scale), out=out)

    def combine(
        self, round_: int, positions: NDArray[np.int64], coefficients: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """``sum_k coefficients[k] * direction(positions[k])``, bit-exact.

        ``hadamard``: the coefficients are scattered to their rows (coefficients of one row are added in the order of
        the positions), transformed by :func:`fwht`, cut to ``size`` and multiplied by the round's signs. The other
        families add one product after another, left to right.

        Args:
            round_: Round of the directions.
            positions: ``int64[n]``, strictly ascending.
            coefficients: ``float32[n]`` as :func:`round_coefficients` gives them.

        Returns:
            ``float32[size]``, owned by the caller.

        Raises:
            ProtocolError: The arrays do not match, or the positions are not ascending or out of range.
        """
        positions = np.asarray(positions, dtype=np.int64)
        coefficients = np.asarray(coefficients, dtype=np.float32)
        if positions.ndim != 1 or positions.shape != coefficients.shape:
            raise ProtocolError(f"{positions.size} positions do not match {coefficients.size} coefficients")
        if positions.size and (
            int(positions[0]) < 0 or int(positions[-1]) >= MAX_POSITION or not (positions[1:] > positions[:-1]).all()
        ):
            raise ProtocolError("the positions are not strictly ascending in [0, 2**60)")
        if self.family == "hadamard":
            return self._decode(round_, positions, coefficients)
        total = np.zeros(self.size, dtype=np.float32)
        product = np.empty(self.size, dtype=np.float32)
        for position, coefficient in zip(positions.tolist(), coefficients, strict=True):
            if coefficient != 0.0:
                self.direction(round_, position, product)
                np.multiply(product, coefficient, out=product)
                np.add(total, product, out=total)
        return total

    def project(self, round_: int, positions: NDArray[np.int64], values: NDArray[np.float32]) -> NDArray[np.float64]:
        """Inner products of ``values float32[size]`` with directions: ``float64[n]``, owned by the caller.

        Only one side computes them, so unlike :meth:`combine` they are no part of the contract. ``hadamard`` takes one
        transform for any number of positions.

        Raises:
            ProtocolError: A position is out of range.
        """
        for position in positions.tolist():
            _check_position(position)
        if self.family == "hadamard":
            spectrum = np.zeros(self.padded, dtype=np.float32)
            np.multiply(values, self._round_signs(round_), out=spectrum[: self.size])
            return fwht(spectrum)[self.rows(positions)].astype(np.float64)
        direction = np.empty(self.size, dtype=np.float32)
        products = [self.direction(round_, position, direction) @ values for position in positions.tolist()]
        return np.array(products, dtype=np.float64)

    def _decode(
        self, round_: int, positions: NDArray[np.int64], coefficients: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        spectrum = np.zeros(self.padded, dtype=np.float32)
        # Positions of one lap over the permutation hit each row at most once, so a lap is one elementwise addition.
        cuts = np.flatnonzero(np.diff(positions // self.padded)) + 1
        for lap, values in zip(np.split(positions, cuts), np.split(coefficients, cuts), strict=True):
            rows = self.rows(lap)
            spectrum[rows] = np.add(spectrum[rows], values)
        fwht(spectrum)
        out = spectrum[: self.size]
        return np.multiply(out, self._round_signs(round_), out=np.empty(self.size, dtype=np.float32))
