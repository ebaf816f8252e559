"""Finds the layers whose output units the saliency shifts: convolutions and matrix products with a trained weight."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from onnx import ModelProto, NodeProto

from ..protocol.artifact.layout import Layout
from ..protocol.artifact.manifest import UnitLayer
from .forward import BATCH
from .passes.editing import attribute, value_shapes

__all__ = ["ConvolutionWindow", "UnitNode", "find_units", "scales_its_bias"]

_ALIASES = ("Identity", "Flatten", "Reshape", "Squeeze")


@dataclass(frozen=True, slots=True)
class ConvolutionWindow:
    """How a convolution walks over its input; one number an axis.

    Attributes:
        kernel: Kernel sizes.
        strides: Strides.
        dilations: Dilations.
        pads_begin: Padding before the first input position.
        input_sizes: Input positions.
        output_sizes: Output positions.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads_begin: tuple[int, ...]
    input_sizes: tuple[int, ...]
    output_sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class UnitNode:
    """A unit layer and the node that computes it.

    Attributes:
        layer: The layer as the manifest describes it.
        input: Value that enters the layer.
        output: Pre-activations, what the node yields.
        rank: Axes of the pre-activations, with the batch.
        channel_axis: Axis of the units among them.
        positions: For a matrix product, how many rows of its input belong to one sample.
        window: For a convolution, its window.
    """

    layer: UnitLayer
    input: str
    output: str
    rank: int
    channel_axis: int
    positions: int
    window: ConvolutionWindow | None


def find_units(model: ModelProto, layout: Layout) -> tuple[UnitNode, ...]:
    """The unit layers of a graph, in the order of the layout.

    A layer counts when its weight is a parameter of ``layout``, is used exactly once, and has the units on its first
    axis: ``Conv`` over one or two axes of known size, ``Gemm`` with ``transB`` or a transposed weight, and ``MatMul``
    with a transposed weight. All other parameters take part in training but not in pruning.

    Args:
        model: A graph in which every parameter is a value under its layout name.
        layout: Its parameters.
    """
    shapes = value_shapes(model)
    uses = Counter(name for node in model.graph.node for name in node.input)
    parameters = {p.name: p.shape for p in layout.parameters if uses[p.name] == 1}
    transposed = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "Transpose"
        and node.input[0] in parameters
        and uses[node.output[0]] == 1
        and len(parameters[node.input[0]]) == 2
        and list(cast(Sequence[int], attribute(node, "perm", [1, 0]))) == [1, 0]
    }
    output_values = _output_values(model)
    order = {p.name: position for position, p in enumerate(layout.parameters)}
    found: list[tuple[int, NodeProto, str, ConvolutionWindow | None]] = []
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[1] in parameters:
            window = _window(node, parameters[node.input[1]], shapes)
            if window is not None:
                found.append((order[node.input[1]], node, node.input[1], window))
        elif node.op_type in ("Gemm", "MatMul"):
            weight = _linear_weight(node, parameters, transposed)
            if weight is not None and _positions(shapes.get(node.input[0], ())) > 0:
                found.append((order[weight], node, weight, None))
    units: list[UnitNode] = []
    shift = moment = 0
    for _, node, weight, window in sorted(found, key=lambda item: item[0]):
        shape = parameters[weight]
        groups = cast(int, attribute(node, "group", 1)) if window is not None else 1
        positions = _positions(shapes[node.input[0]]) if window is None else 1
        is_output = window is None and node.output[0] in output_values and positions == 1
        n_moments = groups * math.prod(shape[1:])
        layer = UnitLayer(weight, shape[0], groups, shift, moment, n_moments, is_output)
        rank = len(shapes[node.input[0]])
        units.append(
            UnitNode(
                layer,
                node.input[0],
                node.output[0],
                rank,
                1 if window is not None else rank - 1,
                positions,
                window,
            )
        )
        shift, moment = shift + shape[0], moment + n_moments
    return tuple(units)


def scales_its_bias(node: NodeProto) -> bool:
    """Whether a layer adds a multiple of its bias: its pre-activations move by that when the bias moves by one.

    Args:
        node: A unit layer.
    """
    return node.op_type == "Gemm" and len(node.input) > 2 and attribute(node, "beta", 1.0) != 1.0


def _linear_weight(node: NodeProto, parameters: dict[str, tuple[int, ...]], transposed: dict[str, str]) -> str | None:
    """Name of the weight of a matrix product with units on the weight's first axis, else None."""
    if node.op_type == "MatMul":
        return transposed.get(node.input[1])
    if attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "transA", 0):
        return None
    if attribute(node, "transB", 0):
        return node.input[1] if node.input[1] in parameters else None
    return transposed.get(node.input[1])


def _positions(shape: tuple[int | str, ...]) -> int:
    """Rows of a sample in the input of a matrix product, 0 when that cannot be told.

    The rows are all axes but the last; exactly one of them is the batch, or the batch times a number.
    """
    rows, batches = 1, 0
    for axis in shape[:-1]:
        if isinstance(axis, str):
            name, _, factor = axis.partition("*")
            if name != BATCH or (factor and not factor.isdecimal()):
                return 0
            batches, axis = batches + 1, int(factor or 1)
        rows *= axis
    return rows if batches == 1 else 0


def _output_values(model: ModelProto) -> set[str]:
    """Values that equal the first graph output up to its shape or an added constant offset."""
    producers = {name: node for node in model.graph.node for name in node.output}
    uses = Counter(name for node in model.graph.node for name in node.input)
    inputs = {value.name for value in model.graph.input} | {tensor.name for tensor in model.graph.initializer}
    name = model.graph.output[0].name
    values = {name}
    while name in producers:
        node = producers[name]
        if node.op_type in _ALIASES:
            name = node.input[0]
        elif node.op_type == "Add" and (node.input[0] in inputs) != (node.input[1] in inputs):
            name = node.input[1] if node.input[0] in inputs else node.input[0]
        else:
            break
        if uses[name] != 1:
            break
        values.add(name)
    return values


def _window(
    node: NodeProto, shape: tuple[int, ...], shapes: dict[str, tuple[int | str, ...]]
) -> ConvolutionWindow | None:
    """The window of a convolution over one or two axes of known size, else None."""
    axes = len(shape) - 2
    source, target = shapes.get(node.input[0], ()), shapes.get(node.output[0], ())
    if axes not in (1, 2) or len(source) != axes + 2 or len(target) != axes + 2:
        return None
    if source[0] != BATCH or any(not isinstance(n, int) for n in (*source[1:], *target[1:])):
        return None
    inputs, outputs = cast(tuple[int, ...], source[2:]), cast(tuple[int, ...], target[2:])
    kernel = shape[2:]
    strides = tuple(cast(Sequence[int], attribute(node, "strides", [1] * axes)))
    dilations = tuple(cast(Sequence[int], attribute(node, "dilations", [1] * axes)))
    pads = tuple(cast(Sequence[int], attribute(node, "pads", [0] * (2 * axes))))[:axes]
    rule = cast(Literal["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"], attribute(node, "auto_pad", "NOTSET"))
    if rule in ("SAME_UPPER", "SAME_LOWER"):
        total = [
            max(0, (out - 1) * s + (k - 1) * d + 1 - n)
            for out, s, k, d, n in zip(outputs, strides, kernel, dilations, inputs, strict=True)
        ]
        pads = tuple(t // 2 if rule == "SAME_UPPER" else t - t // 2 for t in total)
    elif rule == "VALID":
        pads = (0,) * axes
    return ConvolutionWindow(kernel, strides, dilations, pads, inputs, outputs)
