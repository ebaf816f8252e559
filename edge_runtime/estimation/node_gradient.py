"""The gradient of all but a network's first layers, from noise on what its stages yield.

Node perturbation: every sample gets noise of its own, the change of its loss times the noise estimates the gradient
there, and what entered the layer turns that into a gradient of its weights. A layer yields far fewer values than it has
weights, so a pass says far more than one with perturbed weights, and the passes start from stored features.

* A convolutional stage has its noise on its output, behind activation and pooling: there are the fewest values, and
  units that the activation has shut get none. A graph of inference operators (``stage{i}_gradient.onnx``) turns the
  estimate at the output into a gradient of the stage's own weights, and of nothing in front of it.
* The fully connected layers at the end have their noise on their pre-activations.
* The last layer needs none: softmax minus label is its gradient.

All that is known of the loss are its values. Sources: :mod:`..inference.tail`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...protocol.artifact.node_stages import noisy_stages
from ...protocol.artifact.stages import Stage, stage_graph
from ...protocol.errors import ArtifactError
from ...protocol.perturbation.directions import random_signs
from ...protocol.perturbation.streams import Purpose
from ..inference.cut_graphs import CutWeights
from ..inference.engine import Engine
from ..inference.loss import mean_loss
from ..inference.stage_graphs import StageRun, StageWeights, rows_of
from ..inference.tail import TailRun, last_delta, tail_weight_gradient

__all__ = ["NodeGradient", "NodeNoise", "node_gradient"]


@dataclass(frozen=True, eq=False)
class NodeGradient:
    """What one batch says.

    Attributes:
        values: ``float32[n]``, the gradient with respect to the survivors from ``first`` on; owned by the caller.
        first: Survivors in front of the first stage that has noise.
        losses: ``float64[batch]``, the loss of every sample without noise.
        passes: Runs over the batch, those without noise included.
    """

    values: NDArray[np.float32]
    first: int
    losses: NDArray[np.float64]
    passes: int


@dataclass(frozen=True, slots=True)
class NodeNoise:
    """Noise of one device in one round: signs times ``sigma``.

    Attributes:
        repeats: Noisy passes over the batch for every stage, and for the tail.
        sigma: Size.
        seed: Of the run.
        round: The round.
        index: The device's number.
    """

    repeats: int
    sigma: np.float32
    seed: int
    round: int
    index: int

    def fill(self, place: int, repeat: int, signs: NDArray[np.float32]) -> None:
        """Write the signs of one pass to ``signs float32[n]``; ``place`` is 0 for the tail, else stage + 1."""
        random_signs(self.seed, Purpose.NODE_NOISE, self.round, place << 48 | self.index << 16 | repeat, signs)


def node_gradient(
    engine: Engine,
    weights: NDArray[np.float32],
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    noise: NodeNoise,
    before_pass: Callable[[], None] = lambda: None,
) -> NodeGradient:
    """Estimate the gradient of the mean loss.

    Deterministic: the same arguments give the same bits on the same machine and ONNX Runtime.

    Args:
        engine: Gives artifact, mask and limits; a graph that it has loaded is closed.
        weights: ``float32[n_survivors]``, read only.
        x: ``float32[n, *input_shape]``.
        y: ``int64[n]``.
        noise: Of the device and the round.
        before_pass: Called before every pass; may raise.

    Raises:
        ArtifactError: The artifact has no dense tail.
        NonFiniteLossError: The weights have diverged.
        MemoryBudgetError: The tensors do not fit under the engine's limit.
    """
    manifest = engine.artifact.manifest
    if manifest.tail is None:
        raise ArtifactError(
            f"{engine.artifact.source} has no dense tail",
            hint="export it again; the estimator node needs a model that ends with fully connected layers",
        )
    x, y = engine.checked_batch(x, y)
    engine.feeds.write(weights)
    cut, stages = CutWeights(engine, manifest.tail.cut), noisy_stages(manifest)
    if stages:
        outputs = _stage_outputs(engine, manifest.stages[: stages[-1].number + 1], x, before_pass)
    else:
        before_pass()
        outputs = [cut.features(manifest.tail_graphs[0], weights, x)]
    # What enters the noisy stages, and behind the last one the tail; the noisy passes write over their own copies.
    entered = [x, *outputs][-len(stages) - 1 :]
    flowing = [part.copy() for part in entered[1:]] or entered
    with ExitStack() as stack:
        tail = stack.enter_context(TailRun(engine, manifest.tail, cut, flowing[-1], y))
        before_pass()
        tail.run()
        # Copies: the noisy passes write over all outputs.
        losses, logits, inputs = tail.losses.copy(), tail.logits.astype(np.float64), tail.inputs.copy()
        mean_loss(float(losses.sum()), len(y))
        estimate = partial(_estimate, losses=losses, tail=tail, noise=noise, before_pass=before_pass)
        hidden = estimate(tail.noise, np.zeros_like(tail.noise), runs=(), place=0)
        cotangents: list[NDArray[np.float32]] = []
        runs: list[StageRun] = []
        for k in reversed(range(len(stages))):
            cotangents.insert(0, estimate(flowing[k], entered[k + 1], runs=runs, place=stages[k].number + 1))
            between = sum(_share(engine, stage) for stage in stages[k + 1 :])
            engine.sample_passes += len(y) * noise.repeats * between
            if k:
                own = StageWeights(engine, stages[k])
                rows: dict[str, NDArray[Any]] = {"features": flowing[k - 1]}
                name = stage_graph(stages[k].number, "forward")
                run = StageRun(engine, name, own.feeds(), rows, {"next_features": flowing[k]})
                runs.insert(0, stack.enter_context(run))
    parts = [
        _stage_gradient(engine, stage, features, cotangent, before_pass)
        for stage, features, cotangent in zip(stages, entered, cotangents, strict=False)
    ]
    shapes = manifest.tail.shapes(manifest.layout)
    deltas = [hidden, last_delta(logits, y)]
    parts.append(tail_weight_gradient(cut, manifest.tail.layers, shapes, deltas, [entered[-1], inputs]))
    engine.sample_passes += len(y) * manifest.tail.cut.suffix_share  # as many products as a pass through the tail
    noisy = len(stages) + (1 if tail.noise.size else 0)
    values = np.concatenate(parts) if stages else parts[0]
    first = engine.n_survivors - values.size
    passes = len(outputs) + 1 + noisy * noise.repeats + len(stages)
    return NodeGradient(values, first, losses, passes)


def _stage_outputs(
    engine: Engine, stages: Sequence[Stage], x: NDArray[np.float32], before_pass: Callable[[], None]
) -> list[NDArray[np.float32]]:
    """What every stage yields, the first stages of a network one after another."""
    outputs = []
    for stage in stages:
        before_pass()
        output = rows_of(len(x), stage.output_shape)
        name = stage_graph(stage.number, "forward")
        own = StageWeights(engine, stage)
        with StageRun(engine, name, own.feeds(), {"features": x}, {"next_features": output}) as run:
            run.run()
        engine.sample_passes += len(x) * _share(engine, stage)
        outputs.append(output)
        x = output
    return outputs


def _estimate(
    moved: NDArray[np.float32],
    clean: NDArray[np.float32],
    *,
    runs: Sequence[StageRun],
    place: int,
    losses: NDArray[np.float64],
    tail: TailRun,
    noise: NodeNoise,
    before_pass: Callable[[], None],
) -> NDArray[np.float32]:
    """Gradient of every sample's loss at one place: change of its loss times noise, averaged over the repeats.

    Args:
        moved: ``float32[batch, ...]``, the buffer that the passes read; ``clean`` again at the end.
        clean: Its values without noise.
        runs: The stages between it and the tail.
        place: Which noise.
        losses: ``float64[batch]`` without noise.
        tail: The rest of the network.
        noise: How much.
        before_pass: Called before every pass.

    Returns:
        ``float32[batch, ...]``, owned by the caller.
    """
    total = np.zeros_like(clean)
    if not clean.size:
        return total
    signs = np.empty_like(clean)
    scale = noise.repeats * noise.sigma.astype(np.float64)
    rows = (-1, *[1] * (clean.ndim - 1))
    for repeat in range(noise.repeats):
        before_pass()
        noise.fill(place, repeat, signs.reshape(-1))
        np.multiply(signs, noise.sigma, out=moved)
        np.add(moved, clean, out=moved)
        for run in runs:
            run.run()
        tail.run()
        change = ((tail.losses - losses) / scale).astype(np.float32)
        signs *= change.reshape(rows)
        total += signs
    np.copyto(moved, clean)
    return total


def _stage_gradient(
    engine: Engine,
    stage: Stage,
    features: NDArray[np.float32],
    cotangent: NDArray[np.float32],
    before_pass: Callable[[], None],
) -> NDArray[np.float32]:
    """Mean over the batch of the gradient with respect to the survivors of a stage."""
    before_pass()
    own = StageWeights(engine, stage)
    gradient = np.empty(own.size, np.float32)
    rows: dict[str, NDArray[Any]] = {"features": features, "cotangent": cotangent}
    name = stage_graph(stage.number, "gradient")
    with StageRun(engine, name, own.feeds(), rows, {}, {"gradient": gradient}) as run:
        run.run()
    engine.sample_passes += len(features) * 2 * _share(engine, stage)  # its output again, and the gradient
    return gradient[own.places] / np.float32(len(features))


def _share(engine: Engine, stage: Stage) -> float:
    """Multiplications of a stage over those of the network."""
    manifest = engine.artifact.manifest
    return stage.multiply_accumulates / sum(each.multiply_accumulates for each in manifest.stages)
