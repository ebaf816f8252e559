"""Adds a constant shift to the pre-activations of every output unit or channel, for the forward-only saliency."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from ..units import UnitNode
from .editing import add_constant, input_names, new_node, replace_nodes
from .infrastructure import GraphPass

__all__ = ["UnitShifts"]


class UnitShifts(GraphPass):
    """Adds ``shift float32[n_units]``: one number a unit, added before any normalisation, at every position.

    Args:
        units: The unit layers, in the order of ``shift``.
    """

    def __init__(self, units: Sequence[UnitNode]) -> None:
        self._units = tuple(units)

    def requires(self, model: ModelProto) -> None:
        """Every unit layer's result is in the graph."""
        made = {name for node in model.graph.node for name in node.output}
        for unit in self._units:
            self.check(unit.output in made, f"the graph does not compute {unit.output!r}")
        self.check(bool(self._units), "there is no unit layer")
        self.check("shift" not in input_names(model.graph), "the graph already has an input shift")

    def ensures(self, model: ModelProto) -> None:
        """Every unit layer's result is a sum."""
        adds = {node.output[0] for node in model.graph.node if node.op_type == "Add"}
        for unit in self._units:
            self.check(unit.output in adds, f"{unit.output!r} is not shifted")

    def transform(self, model: ModelProto) -> bool:
        """Add the shifts."""
        graph = model.graph
        n_units = sum(unit.layer.n_units for unit in self._units)
        graph.input.append(helper.make_tensor_value_info("shift", TensorProto.FLOAT, [n_units]))
        sizes = add_constant(graph, "fedzo.units", np.array([unit.layer.n_units for unit in self._units], np.int64))
        parts = [f"fedzo.shift.{unit.layer.parameter}" for unit in self._units]
        by_output = {unit.output: (unit, part) for unit, part in zip(self._units, parts, strict=True)}
        nodes: list[NodeProto] = [new_node("Split", ["shift", sizes], parts, axis=0)]
        for node in graph.node:
            nodes.append(node)
            unit, part = by_output.get(node.output[0], (None, ""))
            if unit is None:
                continue
            # The node's result gets a new name and the shifted one the old, so that no consumer has to change.
            plain = f"fedzo.unshifted.{unit.layer.parameter}"
            node.output[0] = node.name = plain
            if unit.channel_axis < unit.rank - 1:
                trailing = unit.rank - 1 - unit.channel_axis
                shape = np.array([unit.layer.n_units, *[1] * trailing], np.int64)
                name = add_constant(graph, f"fedzo.shift_shape.{unit.layer.n_units}x{trailing}", shape)
                nodes.append(new_node("Reshape", [part, name], [f"{part}.channels"]))
                part = f"{part}.channels"
            nodes.append(new_node("Add", [plain, part], [unit.output]))
        replace_nodes(graph, nodes)
        return True
