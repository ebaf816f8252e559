"""Device half of the forward-only saliency: one pass with a constant shift a unit, squared changes of the logits.

For a unit with pre-activation ``z`` the sensitivity is ``E_x sum_c (f_c(z + h) - f_c(z))**2 / h**2``, with one
constant ``h`` at every position of a channel. Together with the second moments of the layer's inputs it gives the
score of every weight, see :func:`fedzo.protocol.pruning.saliency.diagonal_scores`. Nothing but sums leaves the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...protocol.artifact.manifest import Manifest
from ...protocol.errors import ConfigError, DataError
from ...protocol.pruning.saliency import layer_draw
from ..inference.engine import Engine, NonFiniteLossError
from .estimators import Cancelled, never

__all__ = ["SaliencyResult", "UnitShiftScorer"]

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class SaliencyResult:
    """What one scoring round measured; the arrays are finite, not negative and owned by the caller.

    Attributes:
        sensitivities: ``float32[n_units]``; 1 for the units of an output layer.
        moments: ``float32[n_moments]``.
        layer_totals: ``float32[n_layers]`` in the order of ``manifest.units``, or ``None`` without draws.
        passes: Forward passes over all samples.
    """

    sensitivities: NDArray[np.float32]
    moments: NDArray[np.float32]
    layer_totals: NDArray[np.float32] | None
    passes: int

    @property
    def blocks(self) -> tuple[NDArray[np.float32], ...]:
        """The arrays as a saliency report carries them."""
        blocks = (self.sensitivities, self.moments)
        return blocks if self.layer_totals is None else (*blocks, self.layer_totals)


class UnitShiftScorer:
    """Measures sensitivities, moments and, when asked, whole-layer totals.

    Args:
        manifest: Of the engine's artifact.
        shift: Size ``h`` of the shift and of the relative step of the draws, a positive number.
        draws: Whole-layer weight perturbations a layer: ``w * (1 + h * sign)`` on the layer's survivors. Their mean
            squared effect estimates the layer's total score (Hutchinson's estimator).
        seed: Run seed of the draws' signs.

    Raises:
        ConfigError: ``shift`` or ``draws`` is out of range.
    """

    def __init__(self, manifest: Manifest, *, shift: float = 1e-2, draws: int = 0, seed: int = 0) -> None:
        if not 0.0 < float(np.float32(shift)) < 10.0 or draws < 0:
            raise ConfigError(f"shift is {shift} and draws is {draws}: the shift must be above 0, the draws not below")
        self._manifest = manifest
        self._shift = np.float32(shift)
        self._draws = draws
        self._seed = seed

    @property
    def passes(self) -> int:
        """Forward passes over all samples that one scoring takes: moments, clean, units, draws."""
        units = sum(unit.n_units for unit in self._manifest.units if not unit.is_output)
        return 2 + units + self._draws * len(self._manifest.units)

    def score(
        self,
        engine: Engine,
        weights: NDArray[np.float32],
        x: NDArray[np.float32],
        round_: int,
        cancelled: Callable[[], bool] = never,
    ) -> SaliencyResult:
        """Score the current weights on some inputs.

        Deterministic: the same arguments give the same bits on the same machine and ONNX Runtime. Memory beside the
        engine's: the inputs, and the logits of one micro-batch.

        Args:
            engine: Runs the graphs; its ``weights_feed`` is overwritten.
            weights: ``float32[n_survivors]``, read only.
            x: ``float32[samples, *input_shape]``, for instance from
                :func:`fedzo.protocol.pruning.saliency.gaussian_inputs`.
            round_: Round of the draws.
            cancelled: Asked before each pass over a micro-batch.

        Raises:
            Cancelled: ``cancelled`` returned true.
            NonFiniteLossError: A result is not finite as float32.
            MemoryBudgetError: The tensors do not fit under the engine's limit.
        """
        if len(x) < 1:
            raise DataError("there are no samples to score on", hint="use Gaussian inputs, or give this device data")
        if cancelled():
            raise Cancelled(f"the scoring of round {round_} was cancelled")
        moments = engine.moments(weights, x)
        units = np.zeros(self._manifest.n_units, dtype=np.float64)
        totals = np.zeros(len(self._manifest.units), dtype=np.float64)
        for start in range(0, len(x), engine.micro_batch):
            self._add(engine, weights, x[start : start + engine.micro_batch], round_, units, totals, cancelled)
        square = float(self._shift) ** 2
        units /= len(x) * square
        totals /= len(x) * square * max(1, self._draws)
        for unit in self._manifest.units:
            if unit.is_output:
                units[unit.shift_offset : unit.shift_offset + unit.n_units] = 1.0
        if not (np.all(np.isfinite(moments)) and np.all(units <= _LARGEST) and np.all(totals <= _LARGEST)):
            raise NonFiniteLossError(
                f"a saliency of round {round_} is not finite: the weights overflow float32",
                hint="export the model again: its initial weights are too large",
            )
        return SaliencyResult(
            sensitivities=units.astype(np.float32),
            moments=moments,
            layer_totals=totals.astype(np.float32) if self._draws else None,
            passes=self.passes,
        )

    def _add(
        self,
        engine: Engine,
        weights: NDArray[np.float32],
        x: NDArray[np.float32],
        round_: int,
        units: NDArray[np.float64],
        totals: NDArray[np.float64],
        cancelled: Callable[[], bool],
    ) -> None:
        """Add the squared changes of one micro-batch to ``units`` and ``totals``."""
        clean = np.empty((len(x), self._manifest.n_classes), dtype=np.float32)
        moved = np.empty_like(clean)
        shift = np.zeros(self._manifest.n_units, dtype=np.float32)

        def logits(out: NDArray[np.float32]) -> NDArray[np.float32]:
            if cancelled():
                raise Cancelled(f"the scoring of round {round_} was cancelled")
            return engine.shifted_logits(engine.weights_feed, x, shift, out=out)

        np.copyto(engine.weights_feed, weights)
        logits(clean)
        for unit in self._manifest.units:
            if unit.is_output:
                continue
            for number in range(unit.shift_offset, unit.shift_offset + unit.n_units):
                shift[number] = self._shift
                units[number] += _squared_change(logits(moved), clean)
                shift[number] = 0.0
        for layer in range(len(self._manifest.units)) if self._draws else ():
            kept, part = self._survivors_of(engine, layer)
            for draw in range(self._draws):
                signs = layer_draw(self._manifest, self._seed, round_, layer, draw)[kept]
                np.multiply(signs, self._shift, out=signs)
                np.add(signs, np.float32(1.0), out=signs)
                np.multiply(weights[part], signs, out=engine.weights_feed[part])
                totals[layer] += _squared_change(logits(moved), clean)
            np.copyto(engine.weights_feed[part], weights[part])

    def _survivors_of(self, engine: Engine, layer: int) -> tuple[NDArray[np.bool_], slice]:
        """Kept entries of a layer's weight, and where they lie among all survivors."""
        layout = self._manifest.layout
        position = layout.position_of(self._manifest.units[layer].parameter)
        kept = engine.mask.kept[layout.slice_of(position)]
        counts = engine.mask.counts()
        start = int(counts[:position].sum())
        return kept, slice(start, start + int(counts[position]))


def _squared_change(moved: NDArray[np.float32], clean: NDArray[np.float32]) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        change = moved.astype(np.float64) - clean
        return float(np.sum(change * change))
