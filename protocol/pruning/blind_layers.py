"""Layers whose unit shifts do not show at the logits, so that their sensitivities are rounding noise.

A constant in front of an instance normalisation, or of a group normalisation with one channel a group, changes nothing,
nor does one that is added to the keys of an attention. In front of weights that start at zero everything changes
nothing. Such layers matter all the same, so they need another score than zero.

A right machine's noise follows from the format. Every value carries a relative error of 2**-24 or so; what all of them
together do to the logits is at most about ``2**-46 T``, squared, where ``T`` is the sum of all diagonal scores, the
effect of relative errors of 1 on every weight. Over a shift ``h`` that is a sensitivity of ``2**-46 T / h**2``. In this
unit the largest sensitivity of blind layers was 0 to 70 (of one behind inputs with a mean of 30 standard deviations
4e3), that of layers of LeNet-5, ResNet-8 and ResNet-20 6e4 and more, from all of their weights down to a hundredth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..artifact.layout import Initialiser, Parameter
from ..artifact.manifest import Manifest, UnitLayer

__all__ = ["Visibility", "derivatives", "exact_sum", "visibility"]

_NOISE = 1000.0 * 2.0**-46
_PIECE = 1 << 16


def exact_sum(values: NDArray[np.float64]) -> float:
    """The correctly rounded sum of ``float64[n]``, the same in any order and on any machine; by the piece."""
    starts = range(0, values.size, _PIECE)
    return math.fsum(value for start in starts for value in values[start : start + _PIECE].tolist())


def derivatives(
    unit: UnitLayer, sensitivities: NDArray[np.float32], moments: NDArray[np.float32]
) -> NDArray[np.float64]:
    """``E||df/dtheta||**2`` of a layer's weights, as the product of its parts: ``float64[size of the weight]``."""
    sensitivity = sensitivities[unit.shift_offset : unit.shift_offset + unit.n_units].astype(np.float64)
    if unit.is_output:
        sensitivity = np.ones_like(sensitivity)
    moment = moments[unit.moment_offset : unit.moment_offset + unit.n_moments].astype(np.float64)
    product: NDArray[np.float64] = sensitivity.reshape(unit.groups, -1, 1) * moment.reshape(unit.groups, 1, -1)
    return product.ravel()


@dataclass(frozen=True)
class Visibility:
    """What unit shifts show of a network; layers are positions in ``manifest.units``.

    Attributes:
        level: Up to this a sensitivity, or a layer's total, is taken for rounding noise.
        blind: Layers none of whose units shows. A dead unit beside others that show makes none, and an output layer is
            never blind.
        unscored: These, and layers whose diagonal scores are all 0, for instance as their weights start at zero. What
            earlier masks of the run have cut off stays what it is, dead, and is in neither.
    """

    level: float
    blind: frozenset[int]
    unscored: frozenset[int]


def visibility(
    manifest: Manifest,
    weights: NDArray[np.float32],
    sensitivities: NDArray[np.float32],
    moments: NDArray[np.float32],
    shift: float,
    kept: NDArray[np.bool_] | None = None,
) -> Visibility:
    """Which layers the measured factors say something about.

    Args:
        manifest: Gives the layers.
        weights: ``float32[layout.size]``, dense.
        sensitivities: ``float32[n_units]``.
        moments: ``float32[n_moments]``.
        shift: Of the units, that they were measured with.
        kept: ``bool[layout.size]``, the survivors; ``None`` if nothing was removed.
    """
    layout = manifest.layout
    # Zeros altogether come from a factor that starts at zero, or else from cutting.
    is_cut = kept is not None and not kept.all() and not any(_starts_at_zero(p) for p in layout.parameters)
    totals = []
    for unit in manifest.units:
        theta = weights[layout.slice_of(layout.position_of(unit.parameter))].astype(np.float64)
        totals.append(exact_sum(theta * theta * derivatives(unit, sensitivities, moments)))
    level = _NOISE * math.fsum(totals) / shift**2
    largest = [
        float("inf") if unit.is_output else float(sensitivities[unit.shift_offset :][: unit.n_units].max())
        for unit in manifest.units
    ]
    blind = frozenset(n for n, value in enumerate(largest) if value <= level and not (value == 0.0 and is_cut))
    empty = frozenset(n for n, total in enumerate(totals) if total == 0.0 and not is_cut)
    return Visibility(level, blind, blind | empty)


def _starts_at_zero(parameter: Parameter) -> bool:
    """Whether it is a factor, not a bias, of zeros."""
    return parameter.initialiser == Initialiser("constant", 0.0) and not parameter.name.endswith("bias")
