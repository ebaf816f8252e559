"""Forward-only saliency: what devices draw, and how their scalars become one score a weight.

The score of weight ``j`` is its part of the neural tangent kernel's trace, ``S_j = theta_j**2 E||df/dtheta_j||**2``.
In a linear or convolutional layer it factorises nearly exactly into the sensitivity of the logits to a constant shift
of the weight's output unit and the second moment of the weight's input; both need forward passes only.

Sources: Wang et al., "NTK-SAP: Improving neural network pruning by aligning training dynamics", ICLR 2023 (the trace as
a saliency, Gaussian inputs); Hutchinson, Commun. Stat. 19 (1990), for the whole-layer draws.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..artifact.manifest import Manifest, UnitLayer
from ..errors import ArtifactError, ProtocolError
from ..perturbation.directions import random_signs
from ..perturbation.quantiles import gaussian_table
from ..perturbation.streams import Purpose, uint16s
from .blind_layers import Visibility, derivatives, exact_sum, visibility

__all__ = ["diagonal_scores", "gaussian_inputs", "kernel_scores", "layer_draw"]


def gaussian_inputs(manifest: Manifest, seed: int, round_: int, index: int, samples: int) -> NDArray[np.float32]:
    """Data-free inputs from the table of normals.

    Args:
        manifest: Gives the shape of one sample.
        seed: Run seed.
        round_: Round.
        index: Which batch, for instance the device's number.
        samples: Batch size.

    Returns:
        ``float32[samples, *input_shape]``, owned by the caller.
    """
    bits = uint16s(seed, Purpose.SALIENCY_INPUT, round_, index, samples * math.prod(manifest.input_shape))
    return np.take(gaussian_table(), bits, mode="clip").reshape(samples, *manifest.input_shape)


def layer_draw(manifest: Manifest, seed: int, round_: int, layer: int, draw: int) -> NDArray[np.float32]:
    """Signs of one whole-layer draw: moving every weight of the layer by ``h * sign * theta`` changes the logits by
    ``h`` times a vector whose expected squared norm is the layer's total score.

    Args:
        manifest: Gives the layers.
        seed: Run seed.
        round_: Round.
        layer: Position in ``manifest.units``.
        draw: Number of the draw, ``0 <= draw < 2**32``.

    Returns:
        ``float32[size of the layer's weight]`` of -1 and +1, owned by the caller.
    """
    layout = manifest.layout
    parameter = layout.parameters[layout.position_of(manifest.units[layer].parameter)]
    out = np.empty(parameter.size, dtype=np.float32)
    return random_signs(seed, Purpose.SALIENCY_DRAW, round_, layer << 32 | draw, out)


def diagonal_scores(
    manifest: Manifest,
    weights: NDArray[np.float32],
    sensitivities: NDArray[np.float32],
    moments: NDArray[np.float32],
    layer_totals: NDArray[np.float32] | None = None,
    *,
    kept: NDArray[np.bool_] | None = None,
    shift: float | None = 1e-2,
) -> NDArray[np.float32]:
    """Score of every weight: ``theta**2 * sensitivity[unit] * moment[input]``.

    A layer of which that says nothing (``unscored`` of :class:`~.blind_layers.Visibility`) is scored without the
    factors that are noise or 0 altogether. Its sum is the measured total if there is one beyond the noise, else the
    lower median of the other layers' sums: a relative change of a whole layer moves the logits about as much whatever
    the layer's size.

    Args:
        manifest: Gives the layers.
        weights: ``float32[layout.size]``, dense; a weight that is already removed is 0 and so is its score.
        sensitivities: ``float32[n_units]``, mean squared change of the logits per squared shift, not negative. Those
            of an output layer are taken as 1, whatever the array says.
        moments: ``float32[n_moments]``, mean squared inputs, not negative.
        layer_totals: ``float32[n_layers]`` in the order of ``manifest.units``: the scores of each layer are scaled
            to this sum. ``None`` leaves them.
        kept: ``bool[layout.size]``, the survivors; ``None`` if nothing was removed.
        shift: Of the units, that the sensitivities were measured with; ``None`` takes all of them as they are.

    Returns:
        ``float32[layout.size]``, owned by the caller; 0 outside the layers of ``manifest.units``.

    Raises:
        ProtocolError: An array has the wrong length, or a value is negative or not finite.
        ArtifactError: A maskable parameter is in no unit layer.
    """
    layout = manifest.layout
    _check_measured(manifest, weights, sensitivities, moments)
    if layer_totals is not None:
        _check("layer totals", layer_totals, len(manifest.units))
    uncovered = {p.name for p in layout.parameters if p.maskable} - {unit.parameter for unit in manifest.units}
    if uncovered:
        raise ArtifactError(f"the maskable parameter {min(uncovered)!r} is in no unit layer", hint="export it again")

    seen = Visibility(0.0, frozenset(), frozenset())
    if shift is not None:
        seen = visibility(manifest, weights, sensitivities, moments, shift, kept)
    parts = [layout.slice_of(layout.position_of(unit.parameter)) for unit in manifest.units]
    layers: list[NDArray[np.float64]] = []
    unknown: list[int] = []
    for number, (unit, part) in enumerate(zip(manifest.units, parts, strict=True)):
        # In float64, as squares of small weights times small moments would underflow float32.
        theta = weights[part].astype(np.float64)
        layer = np.multiply(theta, theta)
        if number in seen.unscored:
            survivors = np.ones_like(layer) if kept is None else kept[part].astype(np.float64)
            layer = _shares(unit, layer, sensitivities, moments, survivors, is_blind=number in seen.blind)
        else:
            np.multiply(layer, derivatives(unit, sensitivities, moments), out=layer)
        if number in seen.unscored and (layer_totals is None or layer_totals[number] <= seen.level):
            unknown.append(number)
        elif layer_totals is not None:
            _scale(layer, float(layer_totals[number]))
        layers.append(layer)
    if unknown:
        sums = [exact_sum(layer) for number, layer in enumerate(layers) if number not in unknown]
        sums = sorted(total for total in sums if total > 0.0)
        for number in unknown:
            _scale(layers[number], sums[(len(sums) - 1) // 2] if sums else 1.0)

    scores = np.zeros(layout.size, dtype=np.float32)
    for part, layer in zip(parts, layers, strict=True):
        scores[part] = np.minimum(layer, float(np.finfo(np.float32).max))
    return scores


def kernel_scores(
    manifest: Manifest,
    weights: NDArray[np.float32],
    sensitivities: NDArray[np.float32],
    moments: NDArray[np.float32],
    kept: NDArray[np.bool_],
    *,
    shift: float = 1e-2,
) -> NDArray[np.float32]:
    """NTK-SAP's score: how fast the kernel's trace changes when a weight's mask entry does, from the same passes.

    For small perturbations that is ``|2 G_j + theta_j dTr/dtheta_j|`` with ``G_j = E||df/dtheta_j||**2`` and ``Tr`` the
    sum of ``G`` over the survivors. In a chain of layers and ReLUs without offsets the logits are proportional to the
    weights of every layer, so over layer ``l`` the second term sums to twice the trace of all other layers (Euler's
    identity). This sum is shared out like ``theta**2 G``; in a blind layer (:class:`~.blind_layers.Visibility`), as if
    all its units were equally sensitive. The identity does not hold where a normalisation follows a layer or branches
    run in parallel.

    Args:
        manifest: Gives the layers.
        weights: ``float32[layout.size]``, dense; a weight that is already removed is 0.
        sensitivities: See :func:`diagonal_scores`.
        moments: See :func:`diagonal_scores`.
        kept: ``bool[layout.size]``, the survivors; all others score 0.
        shift: See :func:`diagonal_scores`.

    Returns:
        ``float32[layout.size]``, owned by the caller; 0 outside the layers of ``manifest.units``.

    Raises:
        ProtocolError: See :func:`diagonal_scores`.
    """
    layout = manifest.layout
    _check_measured(manifest, weights, sensitivities, moments)
    blind = visibility(manifest, weights, sensitivities, moments, shift, kept).blind
    parts = [layout.slice_of(layout.position_of(unit.parameter)) for unit in manifest.units]
    gains = [
        np.where(kept[part], derivatives(unit, sensitivities, moments), 0.0)
        for unit, part in zip(manifest.units, parts, strict=True)
    ]
    traces = [exact_sum(values) for values in gains]
    trace = math.fsum(traces)
    scores = np.zeros(layout.size, dtype=np.float32)
    for number, (unit, part) in enumerate(zip(manifest.units, parts, strict=True)):
        values, own = gains[number], traces[number]
        squares = np.square(weights[part], dtype=np.float64)
        if number in blind:
            survivors = kept[part].astype(np.float64)
            shares = _shares(unit, squares, sensitivities, moments, survivors, is_blind=True)
        else:
            shares = squares * values
        _scale(shares, trace - own)
        np.add(shares, values, out=shares)
        np.multiply(shares, 2.0, out=shares)
        scores[part] = np.minimum(shares, float(np.finfo(np.float32).max))
    return scores


def _shares(
    unit: UnitLayer,
    squares: NDArray[np.float64],
    sensitivities: NDArray[np.float32],
    moments: NDArray[np.float32],
    survivors: NDArray[np.float64],
    *,
    is_blind: bool,
) -> NDArray[np.float64]:
    """Scores of a layer up to a factor, without those of the squared weights, sensitivities and moments that are noise
    or 0 altogether; never 0 altogether.
    """
    if is_blind:
        sensitivities = np.ones_like(sensitivities)
    if not moments[unit.moment_offset : unit.moment_offset + unit.n_moments].any():
        moments = np.ones_like(moments)
    shares = (squares if squares.any() else survivors) * derivatives(unit, sensitivities, moments)
    return shares if shares.any() else survivors.copy()


def _scale(layer: NDArray[np.float64], total: float) -> None:
    """Bring the sum to ``total``, unless all are 0."""
    now = exact_sum(layer)
    if now > 0.0:
        np.multiply(layer, total / now, out=layer)


def _check_measured(
    manifest: Manifest,
    weights: NDArray[np.float32],
    sensitivities: NDArray[np.float32],
    moments: NDArray[np.float32],
) -> None:
    _check("weights", np.square(weights, dtype=np.float64), manifest.layout.size)
    _check("sensitivities", sensitivities, manifest.n_units)
    _check("moments", moments, manifest.n_moments)


def _check(name: str, values: NDArray[np.float32] | NDArray[np.float64], size: int) -> None:
    if values.shape != (size,):
        raise ProtocolError(f"{size} {name} were expected, not an array of shape {values.shape}")
    if not (np.isfinite(values).all() and (values >= 0.0).all()):
        raise ProtocolError(f"one of the {name} is negative or not finite")
