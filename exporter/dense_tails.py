"""Finds the fully connected layers at the end of a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx import ModelProto

from ..protocol.artifact.dense_tail import DenseLayer, DenseTail
from ..protocol.artifact.layout import Layout
from .cuts import cut_points
from .units import UnitNode, scales_its_bias

__all__ = ["TailPoint", "find_dense_tail"]


@dataclass(frozen=True, slots=True)
class TailPoint:
    """A dense tail and the values that it is made of.

    Attributes:
        tail: As the manifest describes it.
        value: Name of the features in the forward graph.
        units: The layers, first to last.
    """

    tail: DenseTail
    value: str
    units: tuple[UnitNode, ...]


def find_dense_tail(model: ModelProto, layout: Layout, units: Sequence[UnitNode]) -> TailPoint | None:
    """The longest tail of fully connected layers.

    Behind its cut every parameter is the weight of a fully connected layer on rows of numbers, or the bias that such a
    layer adds, and the last layer yields the logits.

    Args:
        model: A forward graph.
        layout: Its parameters, in the order of first use.
        units: Its unit layers.

    Returns:
        None if the network does not end with such a layer, or begins with it.
    """
    nodes = {node.output[0]: node for node in model.graph.node if node.output}
    position = {parameter.name: k for k, parameter in enumerate(layout.parameters)}
    dense: dict[int, tuple[UnitNode, DenseLayer]] = {}
    for unit in units:
        if unit.window is not None or unit.rank != 2 or unit.positions != 1:
            continue
        node, weight = nodes[unit.output], position[unit.layer.parameter]
        if scales_its_bias(node):
            continue
        bias = position.get(node.input[2]) if node.op_type == "Gemm" and len(node.input) > 2 else None
        if bias is None:
            bias = _added_bias(model, unit, position)
        if bias is not None and layout.parameters[bias].shape != (unit.layer.n_units,):
            bias = None
        dense[weight] = unit, DenseLayer(weight, bias)
    best: TailPoint | None = None
    for point in cut_points(model, layout, units):
        first = point.cut.first_parameter
        layers = [entry for weight, entry in sorted(dense.items()) if weight >= first]
        covered = sorted(p for _, layer in layers for p in (layer.weight, layer.bias) if p is not None)
        if (
            covered == list(range(first, len(layout.parameters)))
            and len(point.cut.feature_shape) == 1
            and layers[-1][0].layer.is_output
            and [unit.input for unit, _ in layers].count(point.value) == 1
            and layers[0][0].input == point.value
            and (best is None or first < best.tail.cut.first_parameter)
        ):
            tail = DenseTail(point.cut, tuple(layer for _, layer in layers))
            best = TailPoint(tail, point.value, tuple(unit for unit, _ in layers))
    return best


def _added_bias(model: ModelProto, unit: UnitNode, position: dict[str, int]) -> int | None:
    """Position of the bias that the only consumer of a matrix product adds."""
    consumers = [node for node in model.graph.node if unit.output in node.input]
    if len(consumers) != 1 or consumers[0].op_type != "Add":
        return None
    others = [name for name in consumers[0].input if name != unit.output]
    return position.get(others[0]) if len(others) == 1 else None
