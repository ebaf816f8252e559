"""The chain rule for the operators of a chain, written in operators of inference.

Each rule takes the gradient of a loss at a node's output, the cotangent, and yields that at its input, summed over
nothing: a row a sample. Layers yield the gradients of their parameters as well, summed over the batch.

Convolutions follow Goodfellow, Bengio and Courville, "Deep Learning" (2016), section 9.5: the gradient of the weight
is a convolution of the input with the cotangent, in which batch and channels, and strides and dilations, change places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto

from ..forward import BATCH
from .editing import add_constant, attribute, new_node

__all__ = ["CHAIN_OPERATORS", "Tape", "follows"]

_RESHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
_AXES_OF_WINDOWS = (1, 2)


@dataclass
class Tape:
    """Appends the nodes of the way back to a graph.

    Attributes:
        graph: It holds the forward nodes; new ones go to its end.
        shapes: Of the forward values, with the batch axis.
        parameters: Names of the trained tensors.
        gradients: Name of the value that holds each parameter's gradient, as it is found.
    """

    graph: GraphProto
    shapes: Mapping[str, tuple[int | str, ...]]
    parameters: Collection[str]
    gradients: dict[str, str] = field(default_factory=dict)

    def back(self, node: NodeProto, cotangent: str, *, to_input: bool) -> str:
        """Follow one node backwards; returns the name of the cotangent at its input, empty if it is not wanted."""
        if node.op_type in _LAYERS:
            return _LAYERS[node.op_type](self, node, cotangent, to_input)
        return cotangent if node.op_type == "Identity" else _BETWEEN[node.op_type](self, node, cotangent)

    def add(self, op: str, inputs: Sequence[str], label: str, **attributes: object) -> str:
        """Append a node; ``label`` makes the name of its output."""
        name = f"fedzo.back.{label}"
        self.graph.node.append(new_node(op, inputs, [name], **attributes))
        return name

    def constant(self, label: str, value: NDArray[np.generic]) -> str:
        """Add a constant."""
        return add_constant(self.graph, f"fedzo.back.{label}", value)

    def sample(self, name: str) -> tuple[int, ...]:
        """Shape of one sample of a forward value."""
        return cast(tuple[int, ...], self.shapes[name][1:])

    def weight_of(self, name: str) -> str:
        """The parameter that a value is, or is the transpose of."""
        for node in self.graph.node:
            if name in node.output and node.op_type == "Transpose":
                return str(node.input[0])
        return name


def follows(
    node: NodeProto,
    shapes: Mapping[str, tuple[int | str, ...]],
    constants: Collection[str],
    parameters: Collection[str],
) -> bool:
    """Whether the rule of an operator between layers holds for this node.

    Args:
        node: One of :data:`CHAIN_OPERATORS`.
        shapes: Of the values around it.
        constants: Names of constants.
        parameters: Names of trained tensors.
    """
    source, target = shapes.get(node.input[0], ()), shapes.get(node.output[0], ())
    if node.op_type == "Add":
        return any(name in parameters and shapes[name] == target[1:] for name in node.input) and len(target) == 2
    if any(not s or s[0] != BATCH or not all(isinstance(n, int) for n in s[1:]) for s in (source, target)):
        return False
    if node.op_type in _RESHAPES:
        return all(name in constants for name in node.input[1:])
    if node.op_type in ("AveragePool", "MaxPool"):
        dilated = any(d != 1 for d in cast(Sequence[int], attribute(node, "dilations", [1])))
        plain = attribute(node, "auto_pad", "NOTSET") in ("NOTSET", "VALID") and not attribute(node, "storage_order", 0)
        return len(source) - 2 in _AXES_OF_WINDOWS and plain and not dilated
    return all(name in (node.input[0], "") for name in node.input)


def _reshaped(tape: Tape, node: NodeProto, cotangent: str) -> str:
    name = node.output[0]
    shape = tape.constant(f"shape.{name}", np.array([-1, *tape.sample(node.input[0])], np.int64))
    return tape.add("Reshape", [cotangent, shape], name)


def _relu(tape: Tape, node: NodeProto, cotangent: str) -> str:
    name = node.output[0]
    # The kernel of Where takes two more tensors of this size.
    return tape.add("Mul", [cotangent, tape.add("Sign", [name], f"open.{name}")], name)


def _leaky_relu(tape: Tape, node: NodeProto, cotangent: str) -> str:
    name, alpha = node.output[0], np.float32(cast(float, attribute(node, "alpha", 0.01)))
    zero = tape.constant("zero", np.array(0.0, np.float32))
    leak = tape.constant(f"leak.{name}", np.asarray(alpha))
    rise = tape.constant(f"rise.{name}", np.asarray(np.float32(1.0) - alpha))
    positive = tape.add("Greater", [node.input[0], zero], f"positive.{name}")
    is_open = tape.add("Cast", [positive], f"open.{name}", to=TensorProto.FLOAT)
    slope = tape.add("Add", [tape.add("Mul", [is_open, rise], f"risen.{name}"), leak], f"slope.{name}")
    return tape.add("Mul", [cotangent, slope], name)


def _tanh(tape: Tape, node: NodeProto, cotangent: str) -> str:
    name = node.output[0]
    one = tape.constant("one", np.array(1.0, np.float32))
    squared = tape.add("Mul", [name, name], f"squared.{name}")
    return tape.add("Mul", [cotangent, tape.add("Sub", [one, squared], f"slope.{name}")], name)


def _sigmoid(tape: Tape, node: NodeProto, cotangent: str) -> str:
    name = node.output[0]
    one = tape.constant("one", np.array(1.0, np.float32))
    rest = tape.add("Sub", [one, name], f"rest.{name}")
    return tape.add("Mul", [cotangent, tape.add("Mul", [name, rest], f"slope.{name}")], name)


def _global_average(tape: Tape, node: NodeProto, cotangent: str) -> str:
    name, shape = node.output[0], tape.sample(node.input[0])
    share = tape.constant(f"share.{name}", np.array(1.0 / math.prod(shape[1:]), np.float32))
    full = tape.constant(f"shape.{name}", np.array([1, *shape], np.int64))
    return tape.add("Expand", [tape.add("Mul", [cotangent, share], f"shared.{name}"), full], name)


def _average(tape: Tape, node: NodeProto, cotangent: str) -> str:
    """Every window spreads its cotangent evenly over the positions that it averaged."""
    name = node.output[0]
    (channels, *source), (_, *target) = tape.sample(node.input[0]), tape.sample(name)
    axes = range(len(source))
    kernel = cast(Sequence[int], attribute(node, "kernel_shape"))
    strides = cast(Sequence[int], attribute(node, "strides", [1] * len(source)))
    pads = cast(Sequence[int], attribute(node, "pads", [0] * (2 * len(source))))
    counted = bool(attribute(node, "count_include_pad", 0))
    sizes = [
        _window_sizes(source[a], target[a], kernel[a], strides[a], pads[a], pads[a + len(source)], counted)
        for a in axes
    ]
    shares = 1.0 / np.prod(np.meshgrid(*sizes, indexing="ij"), axis=0)
    weight = np.float32(shares.max())
    if shares.min() < shares.max():
        value = tape.constant(f"share.{name}", shares.astype(np.float32))
        cotangent, weight = tape.add("Mul", [cotangent, value], f"shared.{name}"), np.float32(1.0)
    # Each channel is an image of its own: one kernel of equal weights serves all of them.
    single = tape.constant(f"single.{name}", np.array([-1, 1, *target], np.int64))
    images = tape.add("Reshape", [cotangent, single], f"images.{name}")
    even = tape.constant(f"even.{name}", np.full((1, 1, *kernel), weight, np.float32))
    spread = tape.add(
        "ConvTranspose",
        [images, even],
        f"spread.{name}",
        kernel_shape=list(kernel),
        strides=list(strides),
        **_transposed_sizes(source, target, kernel, strides, [1] * len(source), pads),
    )
    full = tape.constant(f"shape.{name}", np.array([-1, channels, *source], np.int64))
    return tape.add("Reshape", [spread, full], name)


def _window_sizes(
    source: int, target: int, kernel: int, stride: int, before: int, after: int, counted: bool
) -> NDArray[np.float64]:
    """Positions that each window of one axis averages over."""
    starts = np.arange(target) * stride - before
    first, last = (-before, source + after) if counted else (0, source)
    return (np.minimum(starts + kernel, last) - np.maximum(starts, first)).astype(np.float64)


def _transposed_sizes(
    source: Sequence[int],
    target: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
) -> dict[str, list[int]]:
    """Attributes of a ConvTranspose that goes from ``target`` back to ``source``."""
    before, after, extra = list(pads[: len(source)]), [], []
    for axis, size in enumerate(source):
        reach = strides[axis] * (target[axis] - 1) + (kernel[axis] - 1) * dilations[axis] + 1 - before[axis]
        after.append(max(0, reach - size))
        extra.append(max(0, size - reach))
    return {"pads": before + after, "output_padding": extra}


def _maximum(tape: Tape, node: NodeProto, cotangent: str) -> str:
    """Every window gives its cotangent to the first position that had the maximum."""
    name, source = node.output[0], node.input[0]
    places = f"fedzo.back.places.{name}"
    if len(node.output) < 2:
        node.output.append(places)
    flat = tape.constant("flat", np.array([-1], np.int64))
    index = tape.add("Reshape", [node.output[1], flat], f"index.{name}")
    values = tape.add("Reshape", [cotangent, flat], f"values.{name}")
    length = tape.add("Size", [source], f"length.{name}")
    zeros = tape.add("ConstantOfShape", [tape.add("Reshape", [length, flat], f"sizes.{name}")], f"zeros.{name}")
    summed = tape.add("ScatterElements", [zeros, index, values], f"summed.{name}", axis=0, reduction="add")
    full = tape.constant(f"shape.{name}", np.array([-1, *tape.sample(source)], np.int64))
    return tape.add("Reshape", [summed, full], name)


def _bias(tape: Tape, name: str, cotangent: str, axes: Sequence[int]) -> None:
    if name in tape.parameters:
        places = tape.constant("axes" + "x".join(map(str, axes)), np.array(axes, np.int64))
        tape.gradients[name] = tape.add("ReduceSum", [cotangent, places], f"gradient.{name}", keepdims=0)


def _add(tape: Tape, node: NodeProto, cotangent: str) -> str:
    _bias(tape, next(name for name in node.input if name in tape.parameters), cotangent, [0])
    return cotangent


def _dense(tape: Tape, node: NodeProto, cotangent: str, to_input: bool) -> str:
    weight = tape.weight_of(node.input[1])
    tape.gradients[weight] = tape.add("Gemm", [cotangent, node.input[0]], f"gradient.{weight}", transA=1)
    if len(node.input) > 2:
        _bias(tape, node.input[2], cotangent, [0])
    return tape.add("MatMul", [cotangent, weight], node.output[0]) if to_input else ""


def _convolution(tape: Tape, node: NodeProto, cotangent: str, to_input: bool) -> str:
    name, weight = node.output[0], node.input[1]
    source, target = tape.sample(node.input[0])[1:], tape.sample(name)[1:]
    kernel = cast(tuple[int, ...], tape.shapes[weight][2:])
    n = len(kernel)
    strides = list(cast(Sequence[int], attribute(node, "strides", [1] * n)))
    dilations = list(cast(Sequence[int], attribute(node, "dilations", [1] * n)))
    pads = _pads(node, source, target, kernel, strides, dilations)
    swapped = [1, 0, *range(2, n + 2)]
    entered = tape.add("Transpose", [node.input[0]], f"entered.{name}", perm=swapped)
    if node.input[0] == "features":
        # First of all: the largest tensor does not fit into what others leave, and the arena keeps both.
        tape.graph.node.insert(0, tape.graph.node.pop())
    left = tape.add("Transpose", [cotangent], f"left.{name}", perm=swapped)
    moved = tape.add(
        "Conv", [entered, left], f"moved.{name}", kernel_shape=list(target), strides=dilations, dilations=strides,
        pads=pads,
    )  # fmt: skip
    # A remainder of the input that no window reached makes further positions.
    reach = [
        (s + pads[a] + pads[a + n] - strides[a] * (target[a] - 1) - 1) // dilations[a] + 1 for a, s in enumerate(source)
    ]
    if reach != list(kernel):
        bounds = [np.zeros(n, np.int64), np.array(kernel, np.int64), np.arange(2, n + 2, dtype=np.int64)]
        limits = [tape.constant(f"{part}.{name}", b) for part, b in zip(("start", "stop", "axis"), bounds, strict=True)]
        moved = tape.add("Slice", [moved, *limits], f"kernel.{name}")
    tape.gradients[weight] = tape.add("Transpose", [moved], f"gradient.{weight}", perm=swapped)
    if len(node.input) > 2:
        _bias(tape, node.input[2], cotangent, [0, *range(2, n + 2)])
    if not to_input:
        return ""
    sizes = _transposed_sizes(source, target, kernel, strides, dilations, pads)
    return tape.add(
        "ConvTranspose", [cotangent, weight], name, kernel_shape=list(kernel), strides=strides, dilations=dilations,
        **sizes,
    )  # fmt: skip


def _pads(
    node: NodeProto,
    source: Sequence[int],
    target: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> list[int]:
    rule = attribute(node, "auto_pad", "NOTSET")
    if rule == "NOTSET":
        return list(cast(Sequence[int], attribute(node, "pads", [0] * (2 * len(source)))))
    if rule == "VALID":
        return [0] * (2 * len(source))
    total = [
        max(0, (out - 1) * s + (k - 1) * d + 1 - size)
        for size, out, k, s, d in zip(source, target, kernel, strides, dilations, strict=True)
    ]
    small, large = [t // 2 for t in total], [t - t // 2 for t in total]
    return [*small, *large] if rule == "SAME_UPPER" else [*large, *small]


_LAYERS: Mapping[str, Callable[[Tape, NodeProto, str, bool], str]] = {
    "Conv": _convolution,
    "Gemm": _dense,
    "MatMul": _dense,
}
_BETWEEN: Mapping[str, Callable[[Tape, NodeProto, str], str]] = {
    "Add": _add,
    "AveragePool": _average,
    "GlobalAveragePool": _global_average,
    "LeakyRelu": _leaky_relu,
    "MaxPool": _maximum,
    "Relu": _relu,
    "Sigmoid": _sigmoid,
    "Tanh": _tanh,
    **dict.fromkeys(_RESHAPES, _reshaped),
}
CHAIN_OPERATORS = frozenset(_BETWEEN) | {"Identity"}
"""What may stand between the layers of a chain."""
