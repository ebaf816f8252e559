"""Keeps one stage of a chain: from what enters its layer to what enters the next one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from onnx import ModelProto

from ..forward import BATCH, float_value
from .editing import drop_inputs, input_names, keep_live_nodes, replace_nodes
from .infrastructure import GraphPass

__all__ = ["KeepStage"]


class KeepStage(GraphPass):
    """Input ``features``, output ``next_features`` or ``logits``; nothing that they do not need.

    Args:
        value: Name of what enters the stage in the forward graph; ``x`` for the first one.
        feature_shape: Its shape without the batch axis.
        output: Name of what leaves it.
        output_shape: Its shape without the batch axis.
        name: What the output is called.
    """

    def __init__(
        self,
        value: str,
        feature_shape: Sequence[int],
        output: str,
        output_shape: Sequence[int],
        name: Literal["next_features", "logits"] = "next_features",
    ) -> None:
        self._value, self._feature_shape = value, tuple(feature_shape)
        self._output, self._output_shape, self._name = output, tuple(output_shape), name

    def requires(self, model: ModelProto) -> None:
        """The graph computes both values."""
        made = {"x"} | {name for node in model.graph.node for name in node.output}
        for name in (self._value, self._output):
            self.check(name in made, f"the graph does not compute {name!r}")

    def ensures(self, model: ModelProto) -> None:
        """The output depends on ``features`` and not on ``x``."""
        used = {name for node in model.graph.node for name in node.input}
        self.check([o.name for o in model.graph.output] == [self._name], f"the output is not {self._name}")
        self.check("features" in used and "x" not in used, f"the stage needs more than {self._value!r}")

    def transform(self, model: ModelProto) -> bool:
        """Name both ends and drop the rest."""
        graph = model.graph
        replace_nodes(graph, [node for node in graph.node if self._value not in node.output])
        ends = {self._value: "features", self._output: self._name}
        for node in graph.node:
            node.input[:] = [ends.get(name, name) for name in node.input]
            node.output[:] = [ends.get(name, name) for name in node.output]
        features = float_value("features", (BATCH, *self._feature_shape))
        others = [value for value in graph.input if value.name != "x"]
        del graph.input[:]
        graph.input.extend([features, *others])
        del graph.output[:]
        graph.output.append(float_value(self._name, (BATCH, *self._output_shape)))
        keep_live_nodes(graph)
        used = {name for node in graph.node for name in node.input}
        drop_inputs(graph, set(input_names(graph)) - used - {"features"})
        return True
