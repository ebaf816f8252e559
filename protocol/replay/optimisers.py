"""Optimisers whose every step is the same bits on every machine.

Only elementwise float32 numpy calls, one per operation, in a fixed order. Square roots go through float64 (float32
roots differ on 32-bit Arm) and bias corrections are products of Python floats. Weights, moments and directions below
``2**-100`` become zero. That is enough for a CPU that flushes denormals to compute the same: a flushed product is at
most ``2**-126``, and either its sum with the other term is below ``2**-100``, or rounding drops the product anyway.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError

__all__ = ["OPTIMISERS", "Optimiser", "OptimiserConfig", "OptimiserName", "n_states"]

OptimiserName = Literal["sgd", "momentum", "sign_momentum", "adam"]
OPTIMISERS: Final[tuple[OptimiserName, ...]] = get_args(OptimiserName)

_Float32s = NDArray[np.float32]
_PIECE: Final = 1 << 16
_SMALLEST: Final = np.float32(2.0**-100)
_STATES: Final[dict[OptimiserName, int]] = {"sgd": 0, "momentum": 1, "sign_momentum": 1, "adam": 2}


@dataclass(frozen=True, slots=True)
class OptimiserConfig:
    """Which optimiser, and its constants.

    Attributes:
        name: ``sgd``; ``momentum`` (heavy ball, ``m = beta1 m + g``); ``sign_momentum`` (Signum: the sign of
            ``m = beta1 m + (1 - beta1) g``); ``adam``.
        beta1: Decay of the first moment, ``0 <= beta1 < 1``.
        beta2: Decay of the second moment, ``0 <= beta2 < 1``.
        epsilon: Added to Adam's denominator, ``1e-12 <= epsilon <= 1``.
        weight_decay: Decoupled (AdamW): a step first removes ``learning_rate * weight_decay`` of each weight.
        front_rate: Learning rate of the first block of weights, relative to that of the others; a run with one block
            has no front.
        ema: Decay of the average of the weights over the updates, ``0 <= ema < 1``; 0 for none. Evaluations and
            deployed models take the average, see ``moving_average.py``.

    Raises:
        ConfigError: A value is unknown or out of range.
    """

    name: OptimiserName = "adam"
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    front_rate: float = 1.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in OPTIMISERS:
            raise ConfigError(f"the optimiser {self.name!r} is not one of {', '.join(OPTIMISERS)}")
        for field, value, low, high in (
            ("beta1", self.beta1, 0.0, 0.99999),
            ("beta2", self.beta2, 0.0, 0.99999),
            ("epsilon", self.epsilon, 1e-12, 1.0),
            ("weight_decay", self.weight_decay, 0.0, 1e6),
            ("front_rate", self.front_rate, 0.0, 1e3),
            ("ema", self.ema, 0.0, 0.99999),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise ConfigError(f"the optimiser's {field} {value!r} is not in [{low}, {high}]")

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "beta1": float(self.beta1),
            "beta2": float(self.beta2),
            "epsilon": float(self.epsilon),
            "weight_decay": float(self.weight_decay),
            "front_rate": float(self.front_rate),
            "ema": float(self.ema),
        }

    @classmethod
    def from_json(cls, data: object) -> OptimiserConfig:
        """Inverse of :meth:`to_json`.

        Raises:
            ConfigError: ``data`` is no optimiser, or lacks or adds a key.
        """
        keys = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(data, Mapping) or set(data) != keys or not isinstance(data["name"], str):
            raise ConfigError(f"an optimiser is an object with the keys {', '.join(sorted(keys))}")
        return cls(**data)


def n_states(config: OptimiserConfig) -> int:
    """Arrays that an optimiser keeps besides the weights, their average included."""
    return _STATES[config.name] + (config.ema > 0)


class Optimiser:
    """One optimiser's state over the surviving weights.

    Args:
        config: Which optimiser.
        size: Number of weights.
        front: How many of them, from the first on, have the rate of ``config.front_rate``.

    Attributes:
        steps: Steps taken.
        state: The moments, ``float32[size]`` each: none for ``sgd``, one for the momentum kinds, two for ``adam``.
            They belong to the optimiser, which writes them in place.
    """

    def __init__(self, config: OptimiserConfig, size: int, front: int = 0) -> None:
        self.config: Final = config
        self._front, self._front_rate = front, np.float32(config.front_rate)
        self.size: Final = size
        self.steps = 0
        self.state: Final[tuple[_Float32s, ...]] = tuple(
            np.zeros(size, dtype=np.float32) for _ in range(_STATES[config.name])
        )
        self._beta1 = np.float32(config.beta1)
        self._beta2 = np.float32(config.beta2)
        self._powers = (1.0, 1.0)

    def restore(self, steps: int, state: tuple[_Float32s, ...]) -> None:
        """Go to an earlier or a received state, whose arrays are copied.

        Raises:
            ConfigError: The number or the length of the arrays is not this optimiser's.
        """
        if len(state) != len(self.state) or any(part.shape != (self.size,) for part in state):
            raise ConfigError(f"{len(self.state)} moments of {self.size} entries were expected, not {len(state)}")
        for mine, theirs in zip(self.state, state, strict=True):
            np.copyto(mine, theirs)
        self._powers = (1.0, 1.0)
        for self.steps in range(1, steps + 1):
            self._advance()
        self.steps = steps

    def _advance(self) -> None:
        """Next powers of the betas: float64 products, which agree everywhere where ``pow`` does not."""
        first, second = self._powers
        self._powers = (first * float(self._beta1), second * float(self._beta2))

    def step(self, weights: _Float32s, gradient: _Float32s, learning_rate: np.float32) -> None:
        """One step, in place.

        Args:
            weights: ``float32[size]``, overwritten.
            gradient: ``float32[size]``, read only.
            learning_rate: A float32 scalar.
        """
        self.steps += 1
        self._advance()
        work = _Workspace(min(self.size, _PIECE))
        for start in range(0, self.size, _PIECE):  # every entry for itself: scratch arrays are those of a piece
            piece = slice(start, start + _PIECE)
            front = min(max(self._front - start, 0), _PIECE)
            moments = tuple(moment[piece] for moment in self.state)
            self._step(weights[piece], gradient[piece], moments, front, np.float32(learning_rate), work)

    def _step(
        self,
        weights: _Float32s,
        gradient: _Float32s,
        moments: tuple[_Float32s, ...],
        n_front: int,
        rate: np.float32,
        work: _Workspace,
    ) -> None:
        front = np.multiply(rate, self._front_rate)
        if self.config.weight_decay:
            factor = np.float32(self.config.weight_decay)
            decay = _scaled(weights, n_front, np.multiply(front, factor), np.multiply(rate, factor))
            np.subtract(weights, decay, out=weights)
        direction = work.flush(self._direction(gradient, moments, work))
        np.subtract(weights, _scaled(direction, n_front, front, rate, out=direction), out=weights)
        work.flush(weights)

    def _direction(self, gradient: _Float32s, moments: tuple[_Float32s, ...], work: _Workspace) -> _Float32s:
        """What the learning rate multiplies, a new array."""
        if self.config.name == "sgd":
            return gradient.copy()
        if self.config.name == "momentum":
            (first,) = moments
            np.multiply(first, self._beta1, out=first)
            np.add(first, gradient, out=first)
            return work.flush(first).copy()
        first = moments[0]
        _average(first, gradient, self._beta1, work)
        if self.config.name == "sign_momentum":
            return np.sign(first)
        second = moments[1]
        square = np.multiply(gradient, gradient)
        _average(second, square, self._beta2, work)
        # m / (1 - beta1**t) / (sqrt(v / (1 - beta2**t)) + epsilon), Kingma and Ba, ICLR 2015, algorithm 1.
        out = np.multiply(first, np.float32(1.0 / (1.0 - self._powers[0])))
        denominator = np.multiply(second, np.float32(1.0 / (1.0 - self._powers[1])), out=square)
        np.copyto(denominator, np.sqrt(denominator.astype(np.float64)), casting="same_kind")
        np.add(denominator, np.float32(self.config.epsilon), out=denominator)
        return np.divide(out, denominator, out=out)


def _scaled(
    values: _Float32s, n_front: int, front: np.float32, rest: np.float32, out: _Float32s | None = None
) -> _Float32s:
    """Each value times its rate. One product an entry: a second one could bring back what a CPU flushes."""
    out = np.empty_like(values) if out is None else out
    np.multiply(values[:n_front], front, out=out[:n_front])
    np.multiply(values[n_front:], rest, out=out[n_front:])
    return out


def _average(moment: _Float32s, value: _Float32s, beta: np.float32, work: _Workspace) -> None:
    """``moment = beta moment + (1 - beta) value``, in place."""
    np.multiply(moment, beta, out=moment)
    np.add(moment, np.multiply(value, np.subtract(np.float32(1.0), beta)), out=moment)
    work.flush(moment)


class _Workspace:
    """Scratch arrays of one step, for a piece."""

    def __init__(self, size: int) -> None:
        self._magnitude = np.empty(size, dtype=np.float32)
        self._small = np.empty(size, dtype=np.bool_)

    def flush(self, values: _Float32s) -> _Float32s:
        """Set entries below ``2**-100`` to +0, in place."""
        magnitude, small = self._magnitude[: values.size], self._small[: values.size]
        np.absolute(values, out=magnitude)
        np.less(magnitude, _SMALLEST, out=small)
        np.copyto(values, np.float32(0.0), where=small)
        return values
