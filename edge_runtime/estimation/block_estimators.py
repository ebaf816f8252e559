"""Device halves of the estimators, one block of scalars for each block of the weights.

=========  =========================================  ==================================================
name       in the first section                       behind it
=========  =========================================  ==================================================
``stein``  differences of losses, whole passes        the same: directions move all weights
``split``  differences of losses, whole passes        differences of losses, passes from stored features
``node``   differences of losses, whole passes        a sketch of the gradient that node perturbation gives
=========  =========================================  ==================================================

Only ``node`` has a state between rounds: what its sketches have not carried yet. Modules of their own: the estimators
``coordinate``, ``local`` and ``local-node``, and the steps that a device makes alone (:mod:`.local_steps`).
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ...protocol.artifact.manifest import Manifest
from ...protocol.artifact.node_stages import noisy_stages
from ...protocol.artifact.stages import stage_graph
from ...protocol.errors import ProtocolError
from ...protocol.perturbation.blocks import Block
from ...protocol.perturbation.directions import Directions
from ...protocol.perturbation.sketch import GradientSketch
from ...protocol.settings import LOCAL_ESTIMATORS, TrainingSettings
from ..datasets.data import Batch
from ..inference.engine import Engine
from ..inference.loss import NonFiniteLossError
from ..inference.loss_source import SuffixLosses, WholeLosses
from ..inference.section_features import section_features
from ..inference.suffix import Suffix
from ..planning.memory import further_session_bytes
from .estimators import Basis, Cancelled, Scalars, SteinEstimator, never
from .node_gradient import NodeNoise, node_gradient

__all__ = [
    "BlockEstimator",
    "BlockScalars",
    "NodeBlocks",
    "ProbeRequest",
    "SplitBlocks",
    "SteinBlocks",
    "StepEstimator",
    "estimator_bytes",
    "make_estimator",
]


_GROUP = 3
"""Directions that share samples where each has only a part of the batch: with the clean loss a run of four queries."""


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
        draw: Number of the batch in the run, which tells the noise; None for the round.
        later: Gives the batches of further local steps, by number from 1 on; None where there are none.
    """

    weights: NDArray[np.float32]
    batch: Batch
    round: int
    index: int
    positions: tuple[NDArray[np.int64], ...]
    sigma: float = 0.0
    draw: int | None = None
    later: Callable[[int], Batch] | None = None

    @property
    def noise_round(self) -> int:
        """Tells the streams of noise."""
        return self.round if self.draw is None else self.draw


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


class StepEstimator(ABC):
    """An estimator in two halves, so that a device can make several steps before it sends anything.

    Without a sketch it begins every round anew.

    Attributes:
        bases: The directions of every block that is measured along some; None for one whose whole gradient is found.
    """

    bases: tuple[Basis | None, ...]

    @abstractmethod
    def measure(self, engine: Engine, request: ProbeRequest, cancelled: Callable[[], bool] = never) -> BlockScalars:
        """What one batch says; no state is read or changed.

        Arguments, determinism and errors are those of :meth:`BlockEstimator.probe`.

        Returns:
            One scalar a position, but the gradient ``float32[size]`` of a block without a basis.
        """

    def encode(self, found: BlockScalars, request: ProbeRequest) -> BlockScalars:
        """Scalars of all blocks, with gradients sketched; the residuals change.

        Raises:
            NonFiniteLossError: A gradient cannot be sketched. Nothing has changed then.
        """
        del request
        return found

    def probe(self, engine: Engine, request: ProbeRequest, cancelled: Callable[[], bool] = never) -> BlockScalars:
        """See :meth:`BlockEstimator.probe`."""
        return self.encode(self.measure(engine, request, cancelled), request)

    def state(self) -> bytes:
        """See :meth:`BlockEstimator.state`."""
        return b""

    def restore(self, state: bytes) -> None:
        """See :meth:`BlockEstimator.restore`."""
        if state:
            raise ProtocolError(f"a state of {len(state)} bytes belongs to another estimator")


class SteinBlocks(StepEstimator):
    """Differences of losses along directions of all weights.

    Args:
        training: Sigma and sides.
        directions: Of the only block.
    """

    def __init__(self, training: TrainingSettings, directions: Directions) -> None:
        self.bases = (directions,)
        self._estimator = SteinEstimator(directions, training.sigma, training.two_sided)

    def measure(self, engine: Engine, request: ProbeRequest, cancelled: Callable[[], bool] = never) -> BlockScalars:
        """See :meth:`StepEstimator.measure`."""
        found = _whole(self._estimator, engine, request, cancelled)
        return BlockScalars((found.values,), found.mean_loss, found.queries)


class SplitBlocks(StepEstimator):
    """Few directions over the first section, more over those behind it for a fraction of the price each.

    The form of DeepZero's feature reuse (Chen et al., arXiv 2310.02025, section 4) with random directions, over the
    artifact's sections or the two sides of its cut.

    Args:
        training: Sigma and sides.
        directions: Of the blocks, front to back.
    """

    def __init__(self, training: TrainingSettings, directions: Sequence[Directions]) -> None:
        self.bases = tuple(directions)
        self._sections = [SteinEstimator(each, training.sigma, training.two_sided) for each in directions]
        self._samples = training.probe_batch

    def measure(self, engine: Engine, request: ProbeRequest, cancelled: Callable[[], bool] = never) -> BlockScalars:
        """See :meth:`StepEstimator.measure`."""
        found = [_whole(self._sections[0], engine, request, cancelled, self._samples)]
        weights = request.weights
        x, y = engine.checked_batch(request.batch.x, request.batch.y)
        behind = zip(self._sections[1:], request.positions[1:], section_features(engine, weights, x), strict=True)
        for estimator, positions, (cut, name, features) in behind:
            with Suffix(engine, cut, name, weights, features, y) as suffix:
                source, moved = SuffixLosses(suffix), weights[suffix.first :]
                found.append(estimator.measure(source, moved, request.round, positions, cancelled, request.sigma))
        passes = sum(part.queries for part in found) + len(found) - 1
        return BlockScalars(tuple(part.values for part in found), found[-1].mean_loss, passes)


class NodeBlocks(StepEstimator):
    """Directions over the first layers; for the others the gradient of node perturbation, as a sketch.

    Args:
        training: Sigma, sides, repeats and feedback.
        blocks: The block that has directions, and the one that is sketched.
        seed: Run seed of directions and noise.
    """

    def __init__(self, training: TrainingSettings, blocks: Sequence[Block], seed: int) -> None:
        front, behind = blocks
        self._repeats, self._sigma, self._seed = training.repeats, np.float32(training.sigma), seed
        directions = Directions(training.directions, seed, front.size, front.number)
        self.bases = directions, None
        self._front = SteinEstimator(directions, training.sigma, training.two_sided)
        self._sketch = GradientSketch(behind.size, training.feedback)
        self._samples = training.probe_batch

    def measure(self, engine: Engine, request: ProbeRequest, cancelled: Callable[[], bool] = never) -> BlockScalars:
        """See :meth:`StepEstimator.measure`."""

        def before_pass() -> None:
            if cancelled():
                raise Cancelled(f"the probe of round {request.round} was cancelled")

        front = _whole(self._front, engine, request, cancelled, self._samples)
        noise = NodeNoise(self._repeats, self._sigma, self._seed, request.noise_round, request.index)
        found = node_gradient(engine, request.weights, request.batch.x, request.batch.y, noise, before_pass)
        mean_loss = float(found.losses.mean())
        return BlockScalars((front.values, found.values), mean_loss, front.queries + found.passes)

    def encode(self, found: BlockScalars, request: ProbeRequest) -> BlockScalars:
        """See :meth:`StepEstimator.encode`."""
        front, gradient = found.blocks
        try:
            scalars = self._sketch.encode(gradient, request.positions[1])
        except ProtocolError as error:
            raise NonFiniteLossError(f"round {request.round}: {error.message}", hint=error.hint) from error
        return dataclasses.replace(found, blocks=(front, scalars))

    def state(self) -> bytes:
        """The residual of the sketch."""
        return self._sketch.state()

    def restore(self, state: bytes) -> None:
        """See :meth:`BlockEstimator.restore`."""
        self._sketch.restore(state)


def _whole(
    estimator: SteinEstimator, engine: Engine, request: ProbeRequest, cancelled: Callable[[], bool], samples: int = 0
) -> Scalars:
    """Differences along the positions of the first block, by whole passes.

    With ``samples`` below the batch, a few directions at a time have that many samples of their own, one group after
    the other: they say more together than all directions say of the same few samples.
    """
    batch, positions = request.batch, request.positions[0]
    n_groups = min(len(batch) // samples, -(-len(positions) // _GROUP)) if 0 < samples < len(batch) else 1
    found = []
    for group, part in enumerate(np.array_split(positions, n_groups)):
        rows = slice(group * samples, (group + 1) * samples) if samples else slice(None)
        source = WholeLosses(engine, Batch(batch.x[rows], batch.y[rows]))
        found.append(estimator.measure(source, request.weights, request.round, part, cancelled, request.sigma))
    values = np.concatenate([part.values for part in found])
    mean_loss = float(np.mean([part.mean_loss for part in found]))
    return Scalars(values, mean_loss, sum(part.queries for part in found))


def make_estimator(training: TrainingSettings, blocks: Sequence[Block], seed: int) -> BlockEstimator:
    """The device half that a run asks for.

    Args:
        training: Names it.
        blocks: Of the run and its mask.
        seed: Run seed of the directions.

    Raises:
        ConfigError: The settings do not fit together.
    """
    estimator = _of_one_step(training, blocks, seed)
    if training.local_steps == 1:
        return estimator
    from .local_steps import LocalSteps  # it needs the contract above

    return LocalSteps(estimator, blocks, training.local_steps, training.local_rate)


def _of_one_step(training: TrainingSettings, blocks: Sequence[Block], seed: int) -> StepEstimator:
    if training.estimator in LOCAL_ESTIMATORS:
        from .local_estimator import LocalBlocks  # it needs the contract above

        return LocalBlocks(training, blocks, seed)
    if training.estimator == "coordinate":
        from .coordinate_estimator import CoordinateBlocks  # it needs the contract above

        return CoordinateBlocks(training, blocks)
    if training.estimator == "node":
        return NodeBlocks(training, blocks, seed)
    directions = [Directions(training.directions, seed, block.size, block.number) for block in blocks]
    if training.estimator == "stein":
        return SteinBlocks(training, directions[0])
    return SplitBlocks(training, directions)


def estimator_bytes(training: TrainingSettings, manifest: Manifest, n_survivors: int) -> int:
    """Memory that an estimator, local steps and an average of the weights take besides what every training takes.

    Args:
        training: Names it.
        manifest: Of the artifact.
        n_survivors: Length of the weights.

    Returns:
        Bytes.
    """
    batch, own = training.batch, 4 * n_survivors if training.optimiser.ema else 0
    if training.local_steps > 1:
        # Weights of its own, and the batch of another step.
        own += 4 * n_survivors + 4 * batch * math.prod(manifest.input_shape)
        # The gradient over the steps so far.
        own += 4 * n_survivors if training.estimator in (*LOCAL_ESTIMATORS, "node") else 0
    if training.estimator in LOCAL_ESTIMATORS:
        from .local_estimator import local_bytes

        return own + local_bytes(training, manifest, n_survivors)
    if training.estimator == "split" and manifest.sections is not None:
        features = [math.prod(cut.feature_shape) for cut in manifest.sections.cuts]
        # What enters a section and what leaves it are both there while it runs.
        return own + 4 * batch * max(a + b for a, b in zip(features, [0, *features], strict=False))
    if training.estimator in ("split", "coordinate") and manifest.cut is not None:
        return own + 4 * batch * math.prod(manifest.cut.feature_shape)
    if training.estimator != "node" or manifest.tail is None:
        return own
    shapes, stages = manifest.tail.shapes(manifest.layout), noisy_stages(manifest)
    units, inputs = sum(n for n, _ in shapes), sum(n for _, n in shapes)
    # Features and inputs of the layers, and once more joined; noise, its signs, the gradient at the units, and joined.
    rows = batch * (8 * inputs + 16 * units)
    # What all stages yield; of those with noise once more with it, and the gradient there; the signs.
    outputs = [math.prod(stage.output_shape) for stage in manifest.stages[: stages[-1].number + 1]] if stages else []
    rows += 4 * batch * (sum(outputs) + 2 * sum(outputs[len(outputs) - len(stages) :]) + max(outputs, default=0))
    # Noise goes through the stages behind, whose graphs are loaded beside that of the tail.
    rows += sum(further_session_bytes(manifest, stage_graph(stage.number, "forward"), batch) for stage in stages[1:])
    # The largest layer's dense gradient, and the places of its survivors; gradient and residual.
    dense = [*(a * b for a, b in shapes), *(4 * stage.layout(manifest.layout).size for stage in stages)]
    return own + rows + 4 * max(dense) + 12 * n_survivors
