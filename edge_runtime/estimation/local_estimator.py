"""Device halves of the estimators that learn stage by stage: ``local`` and ``local-node``.

Every stage's gradient, and that of all heads together, goes through a sketch of its own with error feedback, so all
that travels is scalars. ``local`` takes the gradients in closed form: forward passes only, but **not** zeroth-order.
``local-node`` estimates them by node perturbation, which is zeroth-order in each stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from ...protocol.artifact.manifest import Manifest
from ...protocol.artifact.stages import local_stages
from ...protocol.errors import ProtocolError
from ...protocol.perturbation.blocks import Block
from ...protocol.perturbation.sketch import GradientSketch
from ...protocol.settings import TrainingSettings
from ..inference.engine import Engine
from ..inference.loss import NonFiniteLossError
from ..inference.stage_graphs import stage_bytes
from .block_estimators import BlockScalars, ProbeRequest, StepEstimator
from .estimators import Cancelled, never
from .local_gradient import local_gradients, noisy_gradients
from .node_gradient import NodeNoise

__all__ = ["LocalBlocks", "local_bytes"]


class LocalBlocks(StepEstimator):
    """A sketch of every stage's gradient of its own loss, and one of the heads' gradients.

    Args:
        training: Names the form, and gives repeats, sigma and feedback.
        blocks: Of the run.
        seed: Run seed of the noise.
    """

    def __init__(self, training: TrainingSettings, blocks: Sequence[Block], seed: int) -> None:
        self._exact = training.estimator == "local"
        self._repeats, self._sigma = training.repeats, np.float32(training.sigma)
        self._seed, self._blocks = seed, tuple(blocks)
        self.bases = (None,) * len(blocks)
        self._sketches = tuple(GradientSketch(block.size, training.feedback) for block in blocks)

    def measure(self, engine: Engine, request: ProbeRequest, cancelled: Callable[[], bool] = never) -> BlockScalars:
        """See :meth:`~.block_estimators.StepEstimator.measure`."""

        def before_pass() -> None:
            if cancelled():
                raise Cancelled(f"the probe of round {request.round} was cancelled")

        weights, batch = request.weights, request.batch
        if self._exact:
            found = local_gradients(engine, weights, batch.x, batch.y, before_pass)
        else:
            noise = NodeNoise(self._repeats, self._sigma, self._seed, request.noise_round, request.index)
            found = noisy_gradients(engine, weights, batch.x, batch.y, noise, before_pass)
        blocks = tuple(found.values[block.first : block.first + block.size] for block in self._blocks)
        return BlockScalars(blocks, float(found.losses.mean()), found.passes)

    def encode(self, found: BlockScalars, request: ProbeRequest) -> BlockScalars:
        """See :meth:`~.block_estimators.StepEstimator.encode`."""
        before = [sketch.residual.copy() for sketch in self._sketches]
        scalars = []
        try:
            for gradient, sketch, positions in zip(found.blocks, self._sketches, request.positions, strict=True):
                scalars.append(sketch.encode(gradient, positions))
        except ProtocolError as error:
            for sketch, residual in zip(self._sketches, before, strict=True):
                np.copyto(sketch.residual, residual)
            raise NonFiniteLossError(f"round {request.round}: {error.message}", hint=error.hint) from error
        return dataclasses.replace(found, blocks=tuple(scalars))

    def state(self) -> bytes:
        """The residuals of all sketches, in the order of the blocks."""
        return b"".join(sketch.state() for sketch in self._sketches)

    def restore(self, state: bytes) -> None:
        """See :meth:`~.block_estimators.BlockEstimator.restore`."""
        size = sum(4 * block.size for block in self._blocks)
        if len(state) != size:
            raise ProtocolError(f"a residual of {len(state)} bytes does not belong to blocks of {size // 4} weights")
        if not np.isfinite(np.frombuffer(state, dtype="<f4")).all():
            raise ProtocolError("a residual is not finite")
        for block, sketch in zip(self._blocks, self._sketches, strict=True):
            sketch.restore(state[4 * block.first : 4 * (block.first + block.size)])


def local_bytes(training: TrainingSettings, manifest: Manifest, n_survivors: int) -> int:
    """What the estimator takes besides what every training takes, in bytes, rounded up.

    Args:
        training: Names the form.
        manifest: Of the artifact.
        n_survivors: Length of the weights.
    """
    stages, layout = local_stages(manifest.stages), manifest.layout
    # What enters a stage and what leaves it; and that with noise, the signs and the gradient there.
    rows = stage_bytes(stages, training.batch, 1 if training.estimator == "local" else 4)
    largest = max((s.layout(layout).size + s.head_size(layout) for s in stages), default=0)
    # A stage's dense gradient, of one micro-batch and of all, and the places of its survivors.
    dense = 16 * largest
    # Gradient, residual, its copy and the sum that a sketch makes.
    return rows + dense + 16 * n_survivors
