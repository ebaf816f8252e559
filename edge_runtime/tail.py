"""The gradient of a network's fully connected layers from forward passes alone.

Node perturbation: every sample gets noise of its own on the pre-activations, the change of its loss times the noise
estimates the gradient there, and the input of the layer turns that into a gradient of its weights. The noise has as
many entries as units, not as weights, so a pass says far more than one with perturbed weights; and all passes start
from stored features. The last layer needs no noise: softmax minus label is its gradient.

Sources: Jabri and Flower, "Weight perturbation", IEEE Trans. Neural Networks 3 (1992); Werfel, Xie and Seung, NIPS
2003; Hiratani et al., "On the stability and scalability of node perturbation learning", NeurIPS 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..protocol.dense_tail import DenseLayer
from ..protocol.directions import random_signs
from ..protocol.errors import ArtifactError
from ..protocol.streams import Purpose
from .cut_graphs import CutWeights, bind_input, bind_output, run_bound
from .engine import Engine
from .loss import mean_loss
from .ort import release_arena

__all__ = ["TailGradient", "tail_gradient"]

_GRAPH = "tail.onnx"


@dataclass(frozen=True, eq=False)
class TailGradient:
    """What one batch says.

    Attributes:
        values: ``float32[n]``, the gradient with respect to the survivors behind the cut; owned by the caller.
        first: Survivors in front of the cut.
        losses: ``float64[batch]``, the loss of every sample without noise.
        passes: Runs over the batch, the clean one included.
    """

    values: NDArray[np.float32]
    first: int
    losses: NDArray[np.float64]
    passes: int


def tail_gradient(
    engine: Engine,
    weights: NDArray[np.float32],
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    *,
    repeats: int,
    sigma: np.float32,
    seed: int,
    round_: int,
    index: int,
    before_pass: Callable[[], None] = lambda: None,
) -> TailGradient:
    """Estimate the gradient of the mean loss with respect to the dense tail.

    Deterministic: the same arguments give the same bits on the same machine and ONNX Runtime.

    Args:
        engine: Gives artifact, mask and limits; a graph that it has loaded is closed.
        weights: ``float32[n_survivors]``, read only.
        x: ``float32[n, *input_shape]``.
        y: ``int64[n]``.
        repeats: Noisy passes over the batch; without noise only the last layer has a gradient.
        sigma: Size of the noise, signs of equal probability.
        seed: Of the noise.
        round_: Of the noise.
        index: Of the noise: every device has its own.
        before_pass: Called before every pass; may raise.

    Raises:
        ArtifactError: The artifact has no dense tail.
        NonFiniteLossError: The weights have diverged.
        MemoryBudgetError: The tensors do not fit under the engine's limit.
    """
    manifest = engine.artifact.manifest
    tail = manifest.tail
    if tail is None:
        raise ArtifactError(
            f"{engine.artifact.source} has no dense tail",
            hint="export it again; the estimator node needs a model that ends with fully connected layers",
        )
    x, y = engine.checked_batch(x, y)
    before_pass()
    cut = CutWeights(engine, tail.cut)
    features = cut.features(manifest.tail_graphs[0], weights, x)
    shapes = tail.shapes(manifest.layout)
    n_hidden = sum(n_units for n_units, _ in shapes[:-1])
    passes = 1 + (repeats if n_hidden else 0)
    session = _TailSession(engine, cut, features, y, n_hidden, sum(n_inputs for _, n_inputs in shapes[1:]))
    try:
        before_pass()
        session.run()
        # Copies: the noisy passes write over all outputs.
        losses, logits, inputs = session.losses.copy(), session.logits.astype(np.float64), session.inputs.copy()
        mean_loss(float(losses.sum()), len(y))
        hidden = np.zeros_like(session.noise)
        signs = np.empty(session.noise.size, np.float32)
        for repeat in range(passes - 1):
            before_pass()
            random_signs(seed, Purpose.NODE_NOISE, round_, index << 16 | repeat, signs)
            np.multiply(signs.reshape(hidden.shape), sigma, out=session.noise)
            session.run()
            change = ((session.losses - losses) / (repeats * sigma.astype(np.float64))).astype(np.float32)
            hidden += change[:, np.newaxis] * signs.reshape(hidden.shape)
    finally:
        session.close()
    engine.sample_passes += len(y) * passes * tail.cut.suffix_share
    deltas = [hidden, _last_delta(logits, y)]
    values = _weight_gradient(cut, tail.layers, shapes, deltas, [features, inputs])
    return TailGradient(values, cut.first, losses, passes)


def _last_delta(logits: NDArray[np.float64], y: NDArray[np.int64]) -> NDArray[np.float32]:
    """Gradient of every sample's cross-entropy with respect to its logits: ``float32[batch, n_classes]``."""
    delta: NDArray[np.float64] = np.exp(logits - logits.max(axis=1, keepdims=True))
    delta /= delta.sum(axis=1, keepdims=True)
    delta[np.arange(len(y)), y] -= 1.0
    return delta.astype(np.float32)


def _weight_gradient(
    cut: CutWeights,
    layers: tuple[DenseLayer, ...],
    shapes: tuple[tuple[int, int], ...],
    deltas: list[NDArray[np.float32]],
    inputs: list[NDArray[np.float32]],
) -> NDArray[np.float32]:
    """Mean over the batch of the gradient with respect to the survivors of the tail, layer by layer.

    Args:
        cut: Where the tail begins, and its survivors.
        layers: Of the tail.
        shapes: ``(n_units, n_inputs)`` of every layer.
        deltas: Gradients at the pre-activations of all layers, a row a sample, in any number of pieces.
        inputs: What entered the layers, likewise.
    """
    joined, entered = np.concatenate(deltas, axis=1), np.concatenate(inputs, axis=1)
    joined /= np.float32(len(joined))
    counts, index = cut.counts, cut.index[cut.first :]
    ends = np.cumsum(counts) - cut.first
    gradient = np.empty(index.size, np.float32)
    unit = entry = 0
    for layer, (n_units, n_inputs) in zip(layers, shapes, strict=True):
        delta, rows = joined[:, unit : unit + n_units], entered[:, entry : entry + n_inputs]
        unit, entry = unit + n_units, entry + n_inputs
        part = slice(int(ends[layer.weight] - counts[layer.weight]), int(ends[layer.weight]))
        gradient[part] = (delta.T @ rows).ravel()[index[part]]
        if layer.bias is not None:
            part = slice(int(ends[layer.bias] - counts[layer.bias]), int(ends[layer.bias]))
            gradient[part] = delta.sum(axis=0)[index[part]]
    return gradient


class _TailSession:
    """``tail.onnx`` on one batch, with buffers that are changed in place.

    Attributes:
        noise: ``float32[batch, n_hidden]``, read by every run; zeros at first.
        losses: ``float64[batch]``, written by every run.
        logits: ``float32[batch, n_classes]``.
        inputs: ``float32[batch, n_inputs]`` of all layers but the first.
    """

    def __init__(
        self,
        engine: Engine,
        cut: CutWeights,
        features: NDArray[np.float32],
        y: NDArray[np.int64],
        n_hidden: int,
        n_inputs: int,
    ) -> None:
        self.noise: NDArray[np.float32] = np.zeros((len(y), n_hidden), np.float32)
        self.losses: NDArray[np.float64] = np.zeros(len(y), np.float64)
        self.logits: NDArray[np.float32] = np.zeros((len(y), engine.artifact.manifest.n_classes), np.float32)
        self.inputs: NDArray[np.float32] = np.zeros((len(y), n_inputs), np.float32)
        self._session: Any = engine.open_session(_GRAPH)
        self._bindings: list[Any] = []
        for start in range(0, len(y), engine.micro_batch):
            rows = slice(start, start + engine.micro_batch)
            binding = self._session.io_binding()
            cut.bind_behind(self._session, binding)
            bind_input(binding, "features", features[rows])
            bind_input(binding, "y", y[rows])
            bind_output(binding, "losses", self.losses[rows])
            bind_output(binding, "logits", self.logits[rows])
            if n_hidden:
                bind_input(binding, "noise", self.noise[rows])
                bind_output(binding, "inputs", self.inputs[rows])
            self._bindings.append(binding)

    def run(self) -> None:
        """One pass over the batch."""
        for binding in self._bindings:
            run_bound(self._session, binding, _GRAPH)

    def close(self) -> None:
        """Unload the graph and give its memory back."""
        self._session, self._bindings = None, []
        release_arena()
