"""Lets a graph yield what enters its fully connected layers."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import ModelProto, TensorProto, helper

from ..forward import BATCH
from ..units import UnitNode
from .editing import new_node
from .infrastructure import GraphPass

__all__ = ["LayerInputs"]


class LayerInputs(GraphPass):
    """Adds the output ``inputs float32[batch, n]``: the inputs of fully connected layers, one after another.

    Args:
        units: The layers and their inputs, in that order.
        sizes: Numbers a sample that enter each of them.
    """

    def __init__(self, units: Sequence[UnitNode], sizes: Sequence[int]) -> None:
        self._units = tuple(units)
        self._sizes = tuple(sizes)

    def requires(self, model: ModelProto) -> None:
        """The graph computes every input."""
        made = {name for node in model.graph.node for name in node.output} | {v.name for v in model.graph.input}
        self.check(bool(self._units), "there is no layer")
        for unit in self._units:
            self.check(unit.input in made, f"the graph does not compute {unit.input!r}")

    def ensures(self, model: ModelProto) -> None:
        """The inputs are an output."""
        self.check("inputs" in [o.name for o in model.graph.output], "the graph has no output inputs")

    def transform(self, model: ModelProto) -> bool:
        """Join them."""
        graph = model.graph
        graph.node.append(new_node("Concat", [unit.input for unit in self._units], ["inputs"], axis=1))
        graph.output.append(helper.make_tensor_value_info("inputs", TensorProto.FLOAT, [BATCH, sum(self._sizes)]))
        return True
