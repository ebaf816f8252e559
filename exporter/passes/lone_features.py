"""Begins a graph anew behind a stage."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import ModelProto

from ..forward import BATCH, float_value
from .infrastructure import GraphPass

__all__ = ["LoneFeatures"]


class LoneFeatures(GraphPass):
    """Empties the graph but for an input ``features float32[batch, *shape]``.

    Args:
        shape: Of one sample.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = tuple(shape)

    def ensures(self, model: ModelProto) -> None:
        """Nothing else is left."""
        graph = model.graph
        self.check([v.name for v in graph.input] == ["features"] and not graph.node, "the graph is not empty")

    def transform(self, model: ModelProto) -> bool:
        """Remove everything."""
        graph = model.graph
        for field in (graph.node, graph.input, graph.output, graph.initializer, graph.value_info):
            del field[:]
        graph.input.append(float_value("features", (BATCH, *self._shape)))
        return True
