"""Gradients of the stages of a network, each of its own loss, without a pass through the whole network.

A stage and its head are a short network of their own, whose loss nothing behind it changes (Nøkland and Eidnes,
"Training neural networks with local error signals", ICML 2019). Two ways lead to its gradient:

* In closed form: softmax minus label, the head's weights, the pooling, the mask of the activation and a correlation
  with the stage's input, all operators of inference in one graph (``stage{i}_local.onnx``). Forward passes only, but
  **not** zeroth-order: it is the exact gradient.
* By node perturbation: every sample gets noise of its own on the stage's output, the change of its loss times the
  noise estimates the gradient there (``stage{i}_head.onnx``), and the stage's input turns that into a gradient of its
  weights (``stage{i}_gradient.onnx``). The loss is seen through its values alone; sources: :mod:`..inference.tail`.

One stage's activations are alive at a time. The last two stages count as one, and its loss is the network's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...protocol.artifact.manifest import Manifest
from ...protocol.artifact.stages import Stage, local_stages, stage_graph
from ...protocol.errors import ArtifactError
from ..inference.engine import Engine
from ..inference.loss import mean_loss
from ..inference.stage_graphs import StageRun, StageWeights, rows_of
from ..inference.tail import last_delta
from .node_gradient import NodeNoise

__all__ = ["LocalGradients", "local_gradients", "noisy_gradients"]


@dataclass(frozen=True, eq=False)
class LocalGradients:
    """What one batch says.

    Attributes:
        values: ``float32[n_survivors]``: of every weight the gradient of its stage's mean loss, of a head's weight
            that of its own; owned by the caller.
        losses: ``float64[batch]``, the network's own loss of every sample.
        passes: Runs of a graph over the batch.
    """

    values: NDArray[np.float32]
    losses: NDArray[np.float64]
    passes: int


def local_gradients(
    engine: Engine,
    weights: NDArray[np.float32],
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    before_pass: Callable[[], None] = lambda: None,
) -> LocalGradients:
    """The gradients in closed form; exact, so **not** a zeroth-order estimate.

    Deterministic: the same arguments give the same bits on the same machine and ONNX Runtime.

    Args:
        engine: Gives artifact, mask and limits; a graph that it has loaded is closed.
        weights: ``float32[n_survivors]``, read only.
        x: ``float32[n, *input_shape]``.
        y: ``int64[n]``.
        before_pass: Called before every pass; may raise.

    Raises:
        ArtifactError: The artifact has no local heads.
        NonFiniteLossError: The weights have diverged.
        MemoryBudgetError: The tensors do not fit under the engine's limit.
    """
    manifest = _checked(engine)
    features, y = engine.checked_batch(x, y)
    engine.feeds.write(weights)
    values = np.zeros(engine.n_survivors, np.float32)
    losses = np.empty(len(y), np.float64)
    total, last = _multiply_accumulates(manifest), manifest.stages[-1]
    stages = local_stages(manifest.stages)
    for stage in stages:
        before_pass()
        own = StageWeights(engine, stage)
        outputs: dict[str, NDArray[Any]] = {"losses": losses}
        sums = {"gradient": np.empty(own.size, np.float32)}
        following = rows_of(len(y), stage.output_shape if own.head is not None else ())
        if own.head is not None:
            outputs["next_features"] = following
            sums["head_gradient"] = np.empty(own.head.size, np.float32)
        name = stage_graph(stage.number, "local")
        with StageRun(engine, name, own.feeds(), {"features": features, "y": y}, outputs, sums) as run:
            run.run()
        _put(values, own, sums["gradient"], len(y))
        products = 2 * stage.multiply_accumulates  # forwards, and the gradient of the weights
        if own.head is not None:
            values[own.head_survivors] = sums["head_gradient"] / np.float32(len(y))
            features = following
            products += 3 * _head_products(manifest, stage)  # and the way back through the head
        elif len(manifest.stages) > 1:
            products += last.multiply_accumulates  # the way back through the last layer
        engine.sample_passes += len(y) * products / total
    mean_loss(float(losses.sum()), len(y))
    return LocalGradients(values, losses, len(stages))


def noisy_gradients(
    engine: Engine,
    weights: NDArray[np.float32],
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    noise: NodeNoise,
    before_pass: Callable[[], None] = lambda: None,
) -> LocalGradients:
    """The gradients by node perturbation; those of heads and of the last layer are exact, as softmax minus label.

    Arguments, determinism and errors are those of :func:`local_gradients`; ``noise`` is for the stages' outputs.
    """
    manifest = _checked(engine)
    features, y = engine.checked_batch(x, y)
    engine.feeds.write(weights)
    values = np.zeros(engine.n_survivors, np.float32)
    total, passes = _multiply_accumulates(manifest), 0
    *hidden, last = manifest.stages
    scores = _Scores(len(y), manifest.n_classes)

    def forward(stage: Stage, own: StageWeights) -> NDArray[np.float32]:
        before_pass()
        output = rows_of(len(y), stage.output_shape)
        name = stage_graph(stage.number, "forward")
        with StageRun(engine, name, own.feeds(), {"features": features}, {"next_features": output}) as run:
            run.run()
        engine.sample_passes += len(y) * stage.multiply_accumulates / total
        return output

    def backward(stage: Stage, own: StageWeights, cotangent: NDArray[np.float32]) -> None:
        before_pass()
        gradient = np.empty(own.size, np.float32)
        rows = {"features": features, "cotangent": cotangent}
        name = stage_graph(stage.number, "gradient")
        with StageRun(engine, name, own.feeds(), rows, {}, {"gradient": gradient}) as run:
            run.run()
        _put(values, own, gradient, len(y))
        engine.sample_passes += len(y) * 2 * stage.multiply_accumulates / total

    for stage in hidden:
        own = StageWeights(engine, stage)
        output = forward(stage, own)
        behind = own if own.head is not None else StageWeights(engine, last)
        cotangent, done = _perturbed(engine, stage, behind, output, y, scores, noise, before_pass)
        products = _head_products(manifest, stage) if own.head is not None else last.multiply_accumulates
        if own.head is not None:
            delta = scores.delta(y) / np.float32(len(y))
            with np.errstate(invalid="ignore", over="ignore"):  # as in delta()
                values[own.head_survivors] = np.concatenate([(delta.T @ scores.pooled).ravel(), delta.sum(axis=0)])
            engine.sample_passes += len(y) * products / total
        backward(stage, own, cotangent)
        engine.sample_passes += len(y) * done * products / total
        features, passes = output, passes + done + 2
    own = StageWeights(engine, last)
    if not hidden:
        scores.take(forward(last, own), y)
        passes += 1
    mean_loss(float(scores.losses.sum()), len(y))
    backward(last, own, scores.delta(y))
    return LocalGradients(values, scores.losses.copy(), passes + 1)


class _Scores:
    """What a loss makes of a stage's output without noise.

    Attributes:
        losses: ``float64[batch]``.
        logits: ``float32[batch, n_classes]``.
        pooled: ``float32[batch, n_inputs]``, what the stage's own head read.
    """

    def __init__(self, batch: int, n_classes: int) -> None:
        self.losses: NDArray[np.float64] = np.zeros(batch, np.float64)
        self.logits: NDArray[np.float32] = np.zeros((batch, n_classes), np.float32)
        self.pooled: NDArray[np.float32] = np.zeros((batch, 0), np.float32)

    def take(self, logits: NDArray[np.float32], y: NDArray[np.int64]) -> None:
        """Logits of a network of one stage."""
        self.logits = logits
        exact = logits.astype(np.float64)
        exact -= exact.max(axis=1, keepdims=True)
        self.losses = np.log(np.exp(exact).sum(axis=1)) - exact[np.arange(len(y)), y]

    def delta(self, y: NDArray[np.int64]) -> NDArray[np.float32]:
        """Gradient of every sample's loss with respect to its logits: ``float32[batch, n_classes]``."""
        with np.errstate(invalid="ignore"):  # of weights that have diverged, which the losses tell
            return last_delta(self.logits.astype(np.float64), y)


def _perturbed(
    engine: Engine,
    stage: Stage,
    behind: StageWeights,
    output: NDArray[np.float32],
    y: NDArray[np.int64],
    scores: _Scores,
    noise: NodeNoise,
    before_pass: Callable[[], None],
) -> tuple[NDArray[np.float32], int]:
    """Estimate the gradient of every sample's loss with respect to a stage's output.

    Args:
        engine: See above.
        stage: The stage.
        behind: Weights of its head, or of the last stage.
        output: ``float32[batch, *output_shape]``, read only.
        y: Labels.
        scores: Gets what the pass without noise yields.
        noise: Of the round.
        before_pass: Called before every pass.

    Returns:
        ``float32[batch, *output_shape]``, and how many passes it took.
    """
    noisy, cotangent = output.copy(), np.zeros_like(output)
    losses, logits = np.empty_like(scores.losses), np.empty_like(scores.logits)
    outputs: dict[str, NDArray[Any]] = {"losses": losses, "logits": logits}
    pooled = rows_of(len(y), (0 if behind.head is None else behind.head.size // logits.shape[1] - 1,))
    if behind.head is not None:
        outputs["pooled"] = pooled
    with StageRun(
        engine, stage_graph(stage.number, "head"), behind.feeds(), {"features": noisy, "y": y}, outputs
    ) as run:
        before_pass()
        run.run()
        scores.losses, scores.logits = losses.copy(), logits.copy()
        scores.pooled = pooled.copy()
        signs = np.empty(output.size, np.float32)
        shaped = signs.reshape(output.shape)
        over_batch = (-1, *(1 for _ in stage.output_shape))
        for repeat in range(noise.repeats):
            before_pass()
            noise.fill(stage.number + 1, repeat, signs)
            np.multiply(shaped, noise.sigma, out=noisy)
            np.add(noisy, output, out=noisy)
            run.run()
            change = (losses - scores.losses) / (noise.repeats * float(noise.sigma))
            shaped *= change.astype(np.float32).reshape(over_batch)
            cotangent += shaped
    return cotangent, noise.repeats + 1


def _put(values: NDArray[np.float32], own: StageWeights, gradient: NDArray[np.float32], batch: int) -> None:
    np.divide(gradient[own.places], np.float32(batch), out=values[own.survivors])


def _head_products(manifest: Manifest, stage: Stage) -> int:
    return stage.head_size(manifest.layout) - manifest.n_classes


def _multiply_accumulates(manifest: Manifest) -> int:
    """Of the whole network, for one sample: the unit of cost."""
    return sum(stage.multiply_accumulates for stage in manifest.stages)


def _checked(engine: Engine) -> Manifest:
    manifest = engine.artifact.manifest
    if not manifest.learns_locally:
        raise ArtifactError(
            f"{engine.artifact.source} has no local heads",
            hint="export it again with --local-heads; the network has to be one chain of layers",
        )
    return manifest
