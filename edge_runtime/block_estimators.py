"""Device halves of the estimators, one block of scalars for each block of the weights.

=========  =========================================  ==================================================
name       in front of the cut                        behind it
=========  =========================================  ==================================================
``stein``  differences of losses, whole passes        the same: directions move all weights
``split``  differences of losses, whole passes        differences of losses, passes from stored features
``node``   differences of losses, whole passes        a sketch of the gradient that node perturbation gives
=========  =========================================  ==================================================

Only ``node`` has a state between rounds: what its sketches have not carried yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..protocol.blocks import Block, directions_of
from ..protocol.directions import Directions, n_positions
from ..protocol.errors import ProtocolError
from ..protocol.manifest import Manifest
from ..protocol.settings import TrainingSettings
from ..protocol.sketch import GradientSketch
from .data import Batch
from .engine import Engine
from .estimators import Cancelled, Scalars, SteinEstimator, never
from .loss import NonFiniteLossError
from .loss_source import SuffixLosses, WholeLosses
from .suffix import Suffix
from .tail import tail_gradient

__all__ = [
    "BlockEstimator",
    "BlockScalars",
    "NodeBlocks",
    "ProbeRequest",
    "SplitBlocks",
    "SteinBlocks",
    "estimator_bytes",
    "make_estimator",
]


@dataclass(frozen=True, eq=False)
class ProbeRequest:
    """What one round asks of one device.

    Attributes:
        weights: ``float32[n_survivors]``, read only.
        batch: The samples.
        round: Round of directions and noise.
        index: The device's number, for noise of its own.
        positions: ``int64[k]`` for every block.
        sigma: Length scale of the directions in place of the settings', a float32 value; 0 for theirs. Noise on
            pre-activations has a scale of its own and keeps the settings'.
    """

    weights: NDArray[np.float32]
    batch: Batch
    round: int
    index: int
    positions: tuple[NDArray[np.int64], ...]
    sigma: float = 0.0


@dataclass(frozen=True, eq=False)
class BlockScalars:
    """What one device measured in one round.

    Attributes:
        blocks: ``float32[k]`` for every block, finite; owned by the caller.
        mean_loss: Mean loss of the batch at the weights themselves, or nearly there.
        queries: Passes through the network or a part of it.
    """

    blocks: tuple[NDArray[np.float32], ...]
    mean_loss: float
    queries: int


class BlockEstimator(Protocol):
    """What the worker asks of an estimator."""

    def probe(self, engine: Engine, request: ProbeRequest, cancelled: Callable[[], bool] = never) -> BlockScalars:
        """Measure one scalar a position.

        Deterministic: the same arguments and state give the same bits on the same machine and ONNX Runtime.

        Args:
            engine: Evaluates the losses; its ``weights_feed`` is overwritten.
            request: What to measure.
            cancelled: Asked before every pass, or before a run of several.

        Raises:
            Cancelled: ``cancelled`` returned true; the state is that of before.
            NonFiniteLossError: A loss, or a scalar as float32, is not finite; the state is that of before.
            MemoryBudgetError: The tensors do not fit under the engine's limit; the state is that of before.
        """
        ...

    def state(self) -> bytes:
        """What has to be kept for the next round; empty for nothing."""
        ...

    def restore(self, state: bytes) -> None:
        """Go on from a :meth:`state`.

        Raises:
            ProtocolError: It belongs to another estimator or other weights.
        """
        ...


class _Stateless:
    """An estimator that begins every round anew."""

    def state(self) -> bytes:
        """See :meth:`BlockEstimator.state`."""
        return b""

    def restore(self, state: bytes) -> None:
        """See :meth:`BlockEstimator.restore`."""
        if state:
            raise ProtocolError(f"a state of {len(state)} bytes belongs to another estimator")


class SteinBlocks(_Stateless):
    """Differences of losses along directions of all weights.

    Args:
        training: Sigma and sides.
        directions: Of the only block.
    """

    def __init__(self, training: TrainingSettings, directions: Directions) -> None:
        self._estimator = SteinEstimator(directions, training.sigma, training.two_sided)

    def probe(self, engine: Engine, request: ProbeRequest, cancelled: Callable[[], bool] = never) -> BlockScalars:
        """See :meth:`BlockEstimator.probe`."""
        found = _whole(self._estimator, engine, request, cancelled)
        return BlockScalars((found.values,), found.mean_loss, found.queries)


class SplitBlocks(_Stateless):
    """Few directions over the front layers, many over those behind the cut for a fraction of the price each.

    The form of DeepZero's feature reuse (Chen et al., arXiv 2310.02025, section 4) with random directions.

    Args:
        training: Sigma and sides.
        directions: Of the blocks in front of the cut and behind it.
    """

    def __init__(self, training: TrainingSettings, directions: Sequence[Directions]) -> None:
        self._front = SteinEstimator(directions[0], training.sigma, training.two_sided)
        self._behind = SteinEstimator(directions[1], training.sigma, training.two_sided)

    def probe(self, engine: Engine, request: ProbeRequest, cancelled: Callable[[], bool] = never) -> BlockScalars:
        """See :meth:`BlockEstimator.probe`."""
        front = _whole(self._front, engine, request, cancelled)
        weights, batch = request.weights, request.batch
        with Suffix(engine, weights, batch.x, batch.y) as suffix:
            source, moved = SuffixLosses(suffix), weights[suffix.first :]
            behind = self._behind.measure(source, moved, request.round, request.positions[1], cancelled, request.sigma)
        return BlockScalars((front.values, behind.values), behind.mean_loss, front.queries + behind.queries + 1)


class NodeBlocks:
    """Directions over the front layers; for the fully connected ones the gradient of node perturbation, as a sketch.

    Args:
        training: Sigma, sides, repeats and feedback.
        directions: Of the block in front of the tail and of the tail.
    """

    def __init__(self, training: TrainingSettings, directions: Sequence[Directions]) -> None:
        self._repeats, self._sigma = training.repeats, np.float32(training.sigma)
        self._seed = directions[0].seed
        self._front = SteinEstimator(directions[0], training.sigma, training.two_sided)
        self._sketch = GradientSketch(directions[1], training.feedback)

    def probe(self, engine: Engine, request: ProbeRequest, cancelled: Callable[[], bool] = never) -> BlockScalars:
        """See :meth:`BlockEstimator.probe`."""

        def before_pass() -> None:
            if cancelled():
                raise Cancelled(f"the probe of round {request.round} was cancelled")

        front = _whole(self._front, engine, request, cancelled)
        tail = tail_gradient(
            engine,
            request.weights,
            request.batch.x,
            request.batch.y,
            repeats=self._repeats,
            sigma=self._sigma,
            seed=self._seed,
            round_=request.round,
            index=request.index,
            before_pass=before_pass,
        )
        try:
            scalars = self._sketch.encode(tail.values, request.positions[1])
        except ProtocolError as error:
            raise NonFiniteLossError(f"round {request.round}: {error.message}", hint=error.hint) from error
        mean_loss = float(tail.losses.mean())
        return BlockScalars((front.values, scalars), mean_loss, front.queries + tail.passes + 1)

    def state(self) -> bytes:
        """The residual of the sketches."""
        return self._sketch.state()

    def restore(self, state: bytes) -> None:
        """See :meth:`BlockEstimator.restore`."""
        self._sketch.restore(state)


def _whole(estimator: SteinEstimator, engine: Engine, request: ProbeRequest, cancelled: Callable[[], bool]) -> Scalars:
    """Differences along the positions of the first block, by whole passes."""
    source = WholeLosses(engine, request.batch)
    return estimator.measure(source, request.weights, request.round, request.positions[0], cancelled, request.sigma)


def make_estimator(training: TrainingSettings, blocks: Sequence[Block], seed: int) -> BlockEstimator:
    """The device half that a run asks for.

    Args:
        training: Names it.
        blocks: Of the run and its mask.
        seed: Run seed of the directions.

    Raises:
        ConfigError: The settings do not fit together.
    """
    directions = directions_of(blocks, seed)
    if training.estimator == "stein":
        return SteinBlocks(training, directions[0])
    if training.estimator == "split":
        return SplitBlocks(training, directions)
    return NodeBlocks(training, directions)


def estimator_bytes(training: TrainingSettings, manifest: Manifest, n_survivors: int) -> int:
    """Memory that an estimator and an average of the weights take besides what every training takes, in bytes.

    Args:
        training: Names it.
        manifest: Of the artifact.
        n_survivors: Length of the weights.
    """
    batch, average = training.batch, 4 * n_survivors if training.optimiser.ema else 0
    if training.estimator == "split" and manifest.cut is not None:
        return average + 4 * batch * math.prod(manifest.cut.feature_shape)
    if training.estimator != "node" or manifest.tail is None:
        return average
    shapes = manifest.tail.shapes(manifest.layout)
    units, inputs = sum(n for n, _ in shapes), sum(n for _, n in shapes)
    padded = n_positions("hadamard", n_survivors)
    # Features and inputs of the layers, and once more joined; noise, its signs, the gradient at the units, and joined.
    rows = batch * (8 * inputs + 16 * units)
    # The largest layer's dense gradient; gradient, residual, and a transform there and back.
    return average + rows + 4 * max(a * b for a, b in shapes) + 12 * n_survivors + 12 * padded
