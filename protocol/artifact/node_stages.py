"""Which stages of a network learn from noise on their output, and which from directions of their weights."""

from __future__ import annotations

import math

from .manifest import Manifest
from .stages import Stage, stage_graphs

__all__ = ["node_graphs", "noisy_stages"]


def noisy_stages(manifest: Manifest) -> tuple[Stage, ...]:
    """The stages between the first one and the dense tail whose output has no more values than they have weights.

    Of a pass with noise the loss says one number about everything that was moved, so the smaller of the two spaces is
    moved. The first stage, often the one with the largest output and the fewest weights, always has directions.

    Args:
        manifest: Of the artifact.

    Returns:
        Neighbours up to the tail, in order; empty if the network is no chain or has no dense tail.
    """
    if manifest.tail is None:
        return ()
    in_front = [s for s in manifest.stages[1:] if s.end_parameter <= manifest.tail.cut.first_parameter]
    first = len(in_front)
    while first and math.prod(in_front[first - 1].output_shape) <= in_front[first - 1].layout(manifest.layout).size:
        first -= 1
    return tuple(in_front[first:])


def node_graphs(manifest: Manifest) -> tuple[str, ...]:
    """File names of the graphs that node perturbation loads, besides those of every training."""
    noisy = noisy_stages(manifest)
    if not noisy:
        return manifest.tail_graphs
    in_front = manifest.stages[: noisy[-1].number + 1]
    return (*stage_graphs(in_front, ("forward",)), *stage_graphs(noisy, ("gradient",)), manifest.tail_graphs[1])
