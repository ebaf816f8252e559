"""Turns an artifact's graph back into a plain model: weights become constants, pruned entries zeros."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from ...protocol.artifact.layout import Layout
from .editing import drop_inputs, input_names, keep_live_nodes, replace_nodes
from .infrastructure import GraphPass

__all__ = ["FoldWeights"]


class FoldWeights(GraphPass):
    """Drops ``w``, ``index`` and ``counts``, or inputs that are parameters, and gives every parameter its dense value.

    Args:
        layout: The parameters.
        dense: ``float32[layout.size]``, zeros where the mask removed an entry; only read.
    """

    def __init__(self, layout: Layout, dense: NDArray[np.float32]) -> None:
        self._layout = layout
        self._dense = dense

    def requires(self, model: ModelProto) -> None:
        """The graph takes ``w`` or every parameter, and the weights fit the layout."""
        inputs = set(input_names(model.graph))
        named = {p.name for p in self._layout.parameters} <= inputs
        self.check("w" in inputs or named, "the graph has no input w")
        self.check(
            self._dense.shape == (self._layout.size,),
            f"the weights have shape {self._dense.shape}, the layout has {self._layout.size} entries",
        )

    def ensures(self, model: ModelProto) -> None:
        """Nothing uses ``w``, ``index`` or ``counts``."""
        left = {"w", "index", "counts"} & {name for node in model.graph.node for name in node.input}
        self.check(not left, f"the graph still uses {sorted(left)}")

    def transform(self, model: ModelProto) -> bool:
        """Replace what computes a parameter by its value."""
        graph = model.graph
        names = {p.name for p in self._layout.parameters}
        replace_nodes(graph, [node for node in graph.node if node.output[0] not in names])
        for position, parameter in enumerate(self._layout.parameters):
            value = self._dense[self._layout.slice_of(position)].reshape(parameter.shape)
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), parameter.name))
        drop_inputs(graph, {"w", "index", "counts", *names})
        keep_live_nodes(graph)
        return True
