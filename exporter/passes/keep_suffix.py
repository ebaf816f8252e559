"""Keeps the layers behind a cut: from the features to the logits."""

from __future__ import annotations

from onnx import ModelProto, TensorProto, helper

from ..forward import BATCH
from .at_cut import AtCut
from .editing import drop_inputs, input_names, keep_live_nodes, replace_nodes

__all__ = ["KeepSuffix"]


class KeepSuffix(AtCut):
    """Makes one value an input, under the name ``features``, in place of ``x``."""

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
