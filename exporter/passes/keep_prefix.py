"""Keeps the layers in front of a cut: from the input to the features."""

from __future__ import annotations

from onnx import ModelProto, TensorProto, helper

from ..forward import BATCH
from .at_cut import AtCut
from .editing import drop_inputs, input_names, keep_live_nodes

__all__ = ["KeepPrefix"]


class KeepPrefix(AtCut):
    """Makes one value the only output, under the name ``features``, and removes what it does not need."""

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
