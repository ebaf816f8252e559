"""Several steps of a device on weights of its own between two uploads, whatever the estimator.

Every step has a fresh batch. A block that is measured along directions gives each step an equal part of the round's
positions, so a report has one scalar a position as ever: the server decodes it, and a log is replayed, as if all had
been measured at one place. Of a block whose whole gradient is found, the sketch carries the average over the steps.
Between steps the device moves its own weights by plain descent; the replica's stay as they are, and the next round
starts from them again.

Source: DeComFL (Li et al., "Achieving dimension-free communication in federated learning via zeroth-order
optimization", arXiv 2405.15861), whose devices go back to the common weights in the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ...protocol.errors import ProtocolError
from ...protocol.perturbation.blocks import Block
from ...protocol.perturbation.directions import round_coefficients
from ..inference.engine import Engine
from ..inference.loss import NonFiniteLossError
from .block_estimators import BlockScalars, ProbeRequest, StepEstimator
from .estimators import never

__all__ = ["LocalSteps"]


class LocalSteps:
    """An estimator that makes steps of its own.

    Args:
        estimator: Measures one step.
        blocks: Of the run.
        steps: Steps a round; fewer where a round has not one position for each.
        rate: Learning rate of a step.
    """

    def __init__(self, estimator: StepEstimator, blocks: Sequence[Block], steps: int, rate: float) -> None:
        self._estimator, self._blocks = estimator, tuple(blocks)
        self._steps, self._rate = steps, np.float32(rate)

    def probe(self, engine: Engine, request: ProbeRequest, cancelled: Callable[[], bool] = never) -> BlockScalars:
        """See :meth:`~.block_estimators.BlockEstimator.probe`; the mean loss is that of the first step."""
        bases, later = self._estimator.bases, request.later
        assert later is not None, "each step needs a batch"
        counts = [len(p) for p, basis in zip(request.positions, bases, strict=True) if basis is not None]
        steps = min([self._steps, *counts])
        # Nearly equal parts: a small block, or an announced number of directions, need not be a multiple.
        parts = [
            [p] * steps if basis is None else np.array_split(p, steps)
            for p, basis in zip(request.positions, bases, strict=True)
        ]
        weights = request.weights.copy()
        collected: list[list[NDArray[np.float32]]] = [[] for _ in bases]
        mean_loss, queries = 0.0, 0
        for step in range(steps):
            batch = later(step) if step else request.batch
            positions, draw = tuple(part[step] for part in parts), request.round * self._steps + step
            asked = dataclasses.replace(request, weights=weights, batch=batch, positions=positions, draw=draw)
            found = self._estimator.measure(engine, asked, cancelled)
            mean_loss, queries = mean_loss if step else found.mean_loss, queries + found.queries
            for blocks, block, basis in zip(collected, found.blocks, bases, strict=True):
                if basis is None and step:
                    _add(block, blocks[0])
                else:
                    blocks.append(block)
            if step + 1 < steps:
                self._move(weights, asked, found)
        whole = tuple(
            np.multiply(blocks[0], np.float32(1.0 / steps), out=blocks[0]) if basis is None else np.concatenate(blocks)
            for blocks, basis in zip(collected, bases, strict=True)
        )
        return self._estimator.encode(BlockScalars(whole, mean_loss, queries), request)

    def _move(self, weights: NDArray[np.float32], asked: ProbeRequest, found: BlockScalars) -> None:
        """One step of plain descent, in place."""
        bases = self._estimator.bases
        for block, basis, positions, values in zip(self._blocks, bases, asked.positions, found.blocks, strict=True):
            gradient = values
            if basis is not None:
                # As the server would: the mean of scalar times direction, or coordinates of the gradient.
                mean = values.astype(np.float64) / (values.size if block.kind == "probe" else 1)
                try:
                    gradient = basis.combine(asked.round, positions, round_coefficients(mean))
                except ProtocolError as error:
                    raise NonFiniteLossError(f"round {asked.round}: {error.message}", hint=error.hint) from error
            part = weights[block.first : block.first + block.size]
            with np.errstate(over="ignore", invalid="ignore"):  # the next loss tells
                np.subtract(part, np.multiply(gradient, self._rate), out=part)

    def state(self) -> bytes:
        """See :meth:`~.block_estimators.BlockEstimator.state`."""
        return self._estimator.state()

    def restore(self, state: bytes) -> None:
        """See :meth:`~.block_estimators.BlockEstimator.restore`."""
        self._estimator.restore(state)


def _add(gradient: NDArray[np.float32], total: NDArray[np.float32]) -> None:
    with np.errstate(over="ignore", invalid="ignore"):  # the sketch tells
        np.add(total, gradient, out=total)
