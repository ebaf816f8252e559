"""Keeps the layers behind a cut: from the features to the logits."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import ModelProto, TensorProto, helper

from ..forward import BATCH
from .editing import drop_inputs, input_names, keep_live_nodes, replace_nodes
from .infrastructure import GraphPass

__all__ = ["KeepSuffix"]


class KeepSuffix(GraphPass):
    """Makes one value an input, under the name ``features``, in place of ``x``.

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
        """The features are needed and ``x`` is not."""
        used = {name for node in model.graph.node for name in node.input}
        self.check("features" in used, "nothing needs the features")
        self.check("x" not in used, f"what lies behind {self._value!r} needs the input too")

    def transform(self, model: ModelProto) -> bool:
        """Add the input and drop what computed it."""
        graph = model.graph
        replace_nodes(graph, [node for node in graph.node if self._value not in node.output])
        for node in graph.node:
            node.input[:] = ["features" if name == self._value else name for name in node.input]
        features = helper.make_tensor_value_info("features", TensorProto.FLOAT, [BATCH, *self._shape])
        others = list(graph.input)
        del graph.input[:]
        graph.input.extend([features if value.name == "x" else value for value in others])
        keep_live_nodes(graph)
        used = {name for node in graph.node for name in node.input}
        drop_inputs(graph, set(input_names(graph)) - used)
        return True
