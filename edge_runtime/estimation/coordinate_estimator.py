"""Device half of the estimator ``coordinate``: the derivative of one weight after another.

A reference, and for tiny survivor sets: as many scalars as there are weights give the whole gradient, without the noise
of directions. Weights behind the artifact's cut start from stored features (Chen et al., DeepZero, arXiv 2310.02025,
sections 3 and 4). Which weights a round measures is said by the public ranking, as for sketches; a scalar is a
coordinate of the gradient, and what is not measured is not known, so nothing is kept between rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ...protocol.perturbation.blocks import Block
from ...protocol.settings import TrainingSettings
from ..inference.engine import Engine
from ..inference.loss_source import LossSource, SuffixLosses, WholeLosses
from ..inference.suffix import Suffix
from .block_estimators import BlockScalars, ProbeRequest, StepEstimator
from .estimators import Scalars, SteinEstimator, never

__all__ = ["Axes", "CoordinateBlocks"]


class Axes:
    """Directions of a single weight each; the position is its number.

    Args:
        size: Weights.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def scaled(self, round_: int, position: int, scale: np.float32, out: NDArray[np.float32]) -> NDArray[np.float32]:
        """See :meth:`~.estimators.Basis.scaled`."""
        del round_
        out.fill(0.0)
        out[position] = scale
        return out

    def combine(
        self, round_: int, positions: NDArray[np.int64], coefficients: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """See :meth:`~.estimators.Basis.combine`."""
        del round_
        out = np.zeros(self.size, np.float32)
        out[positions] = coefficients
        return out


class CoordinateBlocks(StepEstimator):
    """Differences of losses along single weights.

    Args:
        training: Sigma and sides.
        blocks: The only one.
    """

    def __init__(self, training: TrainingSettings, blocks: Sequence[Block]) -> None:
        self._sigma, self._two_sided = training.sigma, training.two_sided
        self.bases = (Axes(blocks[0].size),)

    def measure(self, engine: Engine, request: ProbeRequest, cancelled: Callable[[], bool] = never) -> BlockScalars:
        """See :meth:`~.block_estimators.StepEstimator.measure`."""
        weights, batch, (positions,) = request.weights, request.batch, request.positions
        cut = engine.artifact.manifest.cut
        first = int(engine.mask.counts()[: cut.first_parameter].sum()) if cut is not None else len(weights)
        n_front = int(np.searchsorted(positions, first))
        found: list[Scalars] = []
        if n_front:
            found.append(self._along(WholeLosses(engine, batch), weights, positions[:n_front], request, cancelled))
        if n_front < len(positions):
            with Suffix.of_cut(engine, weights, batch.x, batch.y) as suffix:
                own = positions[n_front:] - first
                found.append(self._along(SuffixLosses(suffix), weights[first:], own, request, cancelled))
        passes = sum(part.queries for part in found) + (n_front < len(positions))  # the features are one more
        return BlockScalars((np.concatenate([part.values for part in found]),), found[0].mean_loss, passes)

    def _along(
        self,
        source: LossSource,
        weights: NDArray[np.float32],
        positions: NDArray[np.int64],
        request: ProbeRequest,
        cancelled: Callable[[], bool],
    ) -> Scalars:
        estimator = SteinEstimator(Axes(len(weights)), self._sigma, self._two_sided)
        return estimator.measure(source, weights, request.round, positions, cancelled, request.sigma)
