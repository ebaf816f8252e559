"""Keeps one stage of a chain: from what enters its layer to what enters the next one."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import ModelProto, TensorProto, helper

from ..forward import BATCH
from .editing import drop_inputs, input_names, keep_live_nodes, replace_nodes
from .infrastructure import GraphPass

__all__ = ["KeepStage"]


class KeepStage(GraphPass):
    """Input ``features``, output ``next_features``; nothing that they do not need.

    Args:
        value: Name of what enters the stage in the forward graph; ``x`` for the first one.
        feature_shape: Its shape without the batch axis.
        output: Name of what leaves it.
        output_shape: Its shape without the batch axis.
    """

    def __init__(self, value: str, feature_shape: Sequence[int], output: str, output_shape: Sequence[int]) -> None:
        self._value, self._feature_shape = value, tuple(feature_shape)
        self._output, self._output_shape = output, tuple(output_shape)

    def requires(self, model: ModelProto) -> None:
        """The graph computes both values."""
        made = {"x"} | {name for node in model.graph.node for name in node.output}
        for name in (self._value, self._output):
            self.check(name in made, f"the graph does not compute {name!r}")

    def ensures(self, model: ModelProto) -> None:
        """``next_features`` depends on ``features`` and not on ``x``."""
        used = {name for node in model.graph.node for name in node.input}
        self.check([o.name for o in model.graph.output] == ["next_features"], "the output is not next_features")
        self.check("features" in used and "x" not in used, f"the stage needs more than {self._value!r}")

    def transform(self, model: ModelProto) -> bool:
        """Name both ends and drop the rest."""
        graph = model.graph
        replace_nodes(graph, [node for node in graph.node if self._value not in node.output])
        ends = {self._value: "features", self._output: "next_features"}
        for node in graph.node:
            node.input[:] = [ends.get(name, name) for name in node.input]
            node.output[:] = [ends.get(name, name) for name in node.output]
        features = helper.make_tensor_value_info("features", TensorProto.FLOAT, [BATCH, *self._feature_shape])
        others = [value for value in graph.input if value.name != "x"]
        del graph.input[:]
        graph.input.extend([features, *others])
        del graph.output[:]
        shape = [BATCH, *self._output_shape]
        graph.output.append(helper.make_tensor_value_info("next_features", TensorProto.FLOAT, shape))
        keep_live_nodes(graph)
        used = {name for node in graph.node for name in node.input}
        drop_inputs(graph, set(input_names(graph)) - used - {"features"})
        return True
