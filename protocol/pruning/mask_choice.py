"""Which weights a run keeps: from averaged scores of devices, or by the server alone. Encoded as it travels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..artifact.layout import initial_weights
from ..artifact.manifest import Manifest
from ..errors import ConfigError
from ..settings import RunSettings
from ..wire.framing import MAX_SCALARS
from .blind_layers import visibility
from .layer_densities import check_floor, erk_densities, uniform_densities
from .mask import Mask, threshold
from .saliency import diagonal_scores, kernel_scores

__all__ = ["ScoredMask", "check_pruning", "federated_mask", "mask_from_seed"]


class ScoredMask(NamedTuple):
    """A mask from scores.

    Attributes:
        encoded: As it travels.
        unscored: Weights of layers that unit shifts said nothing about.
    """

    encoded: bytes
    unscored: tuple[str, ...]


def check_pruning(manifest: Manifest, settings: RunSettings) -> None:
    """Whether the artifact can be pruned as the settings say.

    Raises:
        ConfigError: It cannot.
    """
    saliency = settings.saliency
    if settings.sparsity > 0:
        check_floor(manifest.layout, settings.sparsity, saliency.floor)
    n_scores = manifest.n_units + manifest.n_moments + (len(manifest.units) if saliency.draws else 0)
    if settings.sparsity > 0 and saliency.is_federated and n_scores > MAX_SCALARS:
        raise ConfigError(
            f"the scores of {manifest.model} are {n_scores:,} numbers a board, a report holds {MAX_SCALARS:,}",
            hint="use --pruning magnitude, erk or random, or no pruning (--sparsity 0)",
        )


def federated_mask(
    manifest: Manifest,
    settings: RunSettings,
    mask: Mask,
    weights: NDArray[np.float32],
    blocks: Sequence[NDArray[np.float32]],
    step: int,
) -> ScoredMask:
    """The mask of one step of the schedule, from scores of the survivors of the step before.

    Layers that forward passes say nothing about (:mod:`.blind_layers`) are scored by their weights and inputs, with
    totals like those of the other layers, and named in the answer.

    Args:
        manifest: Of the artifact.
        settings: Of the run.
        mask: Of the step before.
        weights: ``float32[n_survivors]``, its survivors.
        blocks: Averages over devices: ``float32[n_units]``, ``float32[n_moments]``, and ``float32[n_layers]`` if layers
            were drawn.
        step: Number of the step, from 1.
    """
    layout, saliency = manifest.layout, settings.saliency
    dense = np.zeros(layout.size, dtype=np.float32)
    dense[mask.kept] = weights
    kept, shift = mask.kept, saliency.shift
    seen = visibility(manifest, dense, blocks[0], blocks[1], shift, kept)
    if saliency.method == "ntk-sap":
        stand_ins = seen.blind
        scores = kernel_scores(manifest, dense, blocks[0], blocks[1], kept, shift=shift)
    else:
        stand_ins = seen.unscored
        totals = blocks[2] if len(blocks) > 2 else None
        scores = diagonal_scores(manifest, dense, blocks[0], blocks[1], totals, kept=kept, shift=shift)
    sparsity = saliency.sparsity_after(step, settings.sparsity)
    chosen = threshold(layout, scores, sparsity, within=mask, floor=saliency.floor)
    return ScoredMask(chosen.encode(), tuple(manifest.units[number].parameter for number in sorted(stand_ins)))


def mask_from_seed(manifest: Manifest, settings: RunSettings) -> bytes:
    """The mask of a method that looks at no input: ``magnitude``, ``erk`` or ``random``."""
    layout, sparsity, floor = manifest.layout, settings.sparsity, settings.saliency.floor
    if settings.saliency.method == "magnitude":
        scores = np.abs(initial_weights(layout, manifest.seed))
        return threshold(layout, scores, sparsity, floor=floor).encode()
    share = erk_densities if settings.saliency.method == "erk" else uniform_densities
    return share(layout, sparsity, settings.seed, floor).encode()
