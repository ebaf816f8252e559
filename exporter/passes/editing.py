"""Small edits that several passes share: constants, replaced uses, shapes of values."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

__all__ = [
    "add_constant",
    "attribute",
    "constant_values",
    "drop_inputs",
    "input_names",
    "keep_live_nodes",
    "new_node",
    "replace_nodes",
    "value_shapes",
]

Attribute = int | float | str | Sequence[int]


def add_constant(graph: GraphProto, name: str, value: NDArray[np.generic]) -> str:
    """Add ``value`` as an initialiser unless the graph has one of that name; returns the name."""
    if all(tensor.name != name for tensor in graph.initializer):
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
    return name


def new_node(op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> NodeProto:
    """A node that is named after its first output."""
    return helper.make_node(op, list(inputs), list(outputs), name=outputs[0], **attributes)


def replace_nodes(graph: GraphProto, nodes: Iterable[NodeProto]) -> None:
    """Make ``nodes`` the nodes of ``graph``, in that order."""
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)


def drop_inputs(graph: GraphProto, names: Collection[str]) -> None:
    """Remove the graph inputs called ``names``."""
    kept = [value for value in graph.input if value.name not in names]
    del graph.input[:]
    graph.input.extend(kept)


def input_names(graph: GraphProto) -> list[str]:
    """Names of the graph's inputs, without initialisers that are listed as inputs."""
    constants = {tensor.name for tensor in graph.initializer}
    return [value.name for value in graph.input if value.name not in constants]


def attribute(node: NodeProto, name: str, default: Attribute | None = None) -> Attribute | None:
    """Value of a node's attribute; texts are decoded."""
    for item in node.attribute:
        if item.name == name:
            value = helper.get_attribute_value(item)
            return value.decode() if isinstance(value, bytes) else value
    return default


def constant_values(graph: GraphProto) -> dict[str, NDArray[np.generic]]:
    """Values of the graph's initialisers by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def keep_live_nodes(graph: GraphProto) -> bool:
    """Remove nodes, constants and value types that no output needs; returns whether anything went."""
    needed = {value.name for value in graph.output}
    live: list[NodeProto] = []
    for node in reversed(graph.node):
        if any(name in needed for name in node.output):
            live.append(node)
            needed.update(name for name in node.input if name)
    live.reverse()
    constants = [tensor for tensor in graph.initializer if tensor.name in needed]
    made = {name for node in live for name in node.output}
    types = [value for value in graph.value_info if value.name in made]
    changed = len(live) < len(graph.node) or len(constants) < len(graph.initializer)
    if changed:
        replace_nodes(graph, live)
        del graph.initializer[:]
        graph.initializer.extend(constants)
    if len(types) < len(graph.value_info):
        del graph.value_info[:]
        graph.value_info.extend(types)
    return changed


def value_shapes(model: ModelProto) -> dict[str, tuple[int | str, ...]]:
    """Shapes that ONNX can infer or the graph states; a symbolic axis is a text, an unknown one ``"?"``."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    shapes: dict[str, tuple[int | str, ...]] = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in dims)
    for tensor in graph.initializer:
        shapes[tensor.name] = tuple(tensor.dims)
    return shapes
