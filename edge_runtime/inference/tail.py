"""The fully connected layers at the end of a network, on one batch: noise on their units, and what they learn from it.

Sources: Jabri and Flower, "Weight perturbation", IEEE Trans. Neural Networks 3 (1992); Werfel, Xie and Seung, NIPS
2003; Hiratani et al., "On the stability and scalability of node perturbation learning", NeurIPS 2022.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...protocol.artifact.dense_tail import DenseLayer, DenseTail
from .cut_graphs import CutWeights
from .engine import Engine
from .stage_graphs import StageRun

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["TailRun", "last_delta", "tail_weight_gradient"]

_GRAPH = "tail.onnx"


class TailRun:
    """``tail.onnx`` on one batch, with buffers that are changed in place.

    Args:
        engine: Gives artifact and limits; a graph that it has loaded is closed.
        tail: Of the artifact.
        cut: The weights behind the tail's cut.
        features: ``float32[batch, n_features]``, read by every run; the caller's, must not move.
        y: ``int64[batch]``, likewise.

    Attributes:
        noise: ``float32[batch, n_hidden]``, read by every run; zeros at first.
        losses: ``float64[batch]``, written by every run.
        logits: ``float32[batch, n_classes]``.
        inputs: ``float32[batch, n_inputs]`` of all layers but the first.
    """

    def __init__(
        self, engine: Engine, tail: DenseTail, cut: CutWeights, features: NDArray[np.float32], y: NDArray[np.int64]
    ) -> None:
        shapes = tail.shapes(engine.artifact.manifest.layout)
        n_hidden = sum(n_units for n_units, _ in shapes[:-1])
        n_inputs = sum(n_inputs for _, n_inputs in shapes[1:])
        self.noise: NDArray[np.float32] = np.zeros((len(y), n_hidden), np.float32)
        self.losses: NDArray[np.float64] = np.zeros(len(y), np.float64)
        self.logits: NDArray[np.float32] = np.zeros((len(y), engine.artifact.manifest.n_classes), np.float32)
        self.inputs: NDArray[np.float32] = np.zeros((len(y), n_inputs), np.float32)
        self._engine, self._samples = engine, len(y) * tail.cut.suffix_share
        rows: dict[str, NDArray[Any]] = {"features": features, "y": y}
        outputs: dict[str, NDArray[Any]] = {"losses": self.losses, "logits": self.logits}
        if n_hidden:
            rows["noise"], outputs["inputs"] = self.noise, self.inputs
        self._run = StageRun(engine, _GRAPH, cut.feeds_behind(), rows, outputs)

    def run(self) -> None:
        """One pass over the batch.

        Raises:
            MemoryBudgetError: The tensors do not fit under the engine's limit.
        """
        self._run.run()
        self._engine.sample_passes += self._samples

    def close(self) -> None:
        """Unload the graph and give its memory back."""
        self._run.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def last_delta(logits: NDArray[np.float64], y: NDArray[np.int64]) -> NDArray[np.float32]:
    """Gradient of every sample's cross-entropy with respect to its logits: ``float32[batch, n_classes]``."""
    delta: NDArray[np.float64] = np.exp(logits - logits.max(axis=1, keepdims=True))
    delta /= delta.sum(axis=1, keepdims=True)
    delta[np.arange(len(y)), y] -= 1.0
    return delta.astype(np.float32)


def tail_weight_gradient(
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
