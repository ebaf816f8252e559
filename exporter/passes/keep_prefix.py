"""Keeps the layers in front of a cut: from the input to the features."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import ModelProto, TensorProto, helper

from ..forward import BATCH
from .editing import drop_inputs, input_names, keep_live_nodes
from .infrastructure import GraphPass

__all__ = ["KeepPrefix"]


class KeepPrefix(GraphPass):
    """Makes one value the only output, under the name ``features``, and removes what it does not need.

    Args:
        value: The value that crosses the cut.
        feature_shape: Its shape without the batch axis.
    """

    def __init__(self, value: str, feature_shape: Sequence[int]) -> None:
        self._value = value
        self._shape = tuple(feature_shape)

    def requires(self, model: ModelProto) -> None:
        """The graph computes the value."""
        made = {name for node in model.graph.node for name in node.output}
        self.check(self._value in made, f"the graph does not compute {self._value!r}")

    def ensures(self, model: ModelProto) -> None:
        """The only output is ``features``, and ``x`` is needed for it."""
        self.check([o.name for o in model.graph.output] == ["features"], "the graph's output is not features")
        self.check("x" in input_names(model.graph), "the features do not depend on the input")

    def transform(self, model: ModelProto) -> bool:
        """Name the output and drop the rest."""
        graph = model.graph
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = ["features" if name == self._value else name for name in names]
        del graph.output[:]
        graph.output.append(helper.make_tensor_value_info("features", TensorProto.FLOAT, [BATCH, *self._shape]))
        keep_live_nodes(graph)
        used = {name for node in graph.node for name in node.input}
        drop_inputs(graph, set(input_names(graph)) - used)
        return True
