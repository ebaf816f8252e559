"""What kernels of ONNX Runtime take from the arena for themselves while they run, on one thread.

Measured with onnxruntime 1.32.0, by the smallest arena in which a graph of one such node runs; the order of requests is
that of the kernels' sources.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from onnx import NodeProto

from .arena import ALIGNMENT
from .blocked_rewrites import BLOCKED_DOMAIN
from .forward import BATCH
from .passes.editing import attribute

__all__ = ["CONVOLUTION_WORKSPACE", "Workspace", "unfolded_sample", "workspace_of"]

Linear = tuple[int, int]
Shapes = Mapping[str, tuple[int | str, ...]]

CONVOLUTION_WORKSPACE = 64 << 10
"""Bytes a thread that a convolution takes from the arena to unfold its input piece by piece."""

_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_STATES = {"GRU": 9, "LSTM": 6}


@dataclass(frozen=True, slots=True)
class Workspace:
    """Pieces that a node takes.

    Attributes:
        pieces: Bytes of each, as ``(fixed, per_sample)``.
        before_outputs: Whether it takes them before it takes its outputs.
    """

    pieces: tuple[Linear, ...] = ()
    before_outputs: bool = False


def workspace_of(node: NodeProto, shapes: Shapes, sizes: Mapping[str, Linear]) -> Workspace:
    """The workspace of one node.

    Args:
        node: Of a graph.
        shapes: Of its values, as far as they are known.
        sizes: Bytes of every value that the graph computes.
    """
    if node.op_type in ("Conv", "ConvTranspose"):
        own = _unfolded(node, shapes)
        return Workspace((own,) if own != (0, 0) else ())
    output = sizes.get(node.output[0], (0, 0))
    if node.op_type == "HardSwish":  # a function of two nodes
        return Workspace((output,), before_outputs=True)
    if node.op_type == "Where":  # both sides with zeros where the other one counts
        return Workspace((output, output), before_outputs=True)
    if node.op_type in ("Softmax", "LogSoftmax") and not _is_last(node, shapes):
        return Workspace((output,), before_outputs=True)
    if node.op_type == "Einsum":  # inputs and result with their axes in another order
        entered = [sizes.get(name) or _floats(shapes.get(name, ())) for name in node.input]
        return Workspace((*entered, output), before_outputs=True)
    if node.op_type in _GATES:
        return Workspace(_recurrent(node, shapes, sizes))
    return Workspace()


def _unfolded(node: NodeProto, shapes: Shapes) -> Linear:
    """Bytes of an unfolded input.

    Convolutions unfold their input (``MlasConvPrepare``); in one that makes a weight's gradient the samples are what it
    sums over. Transposed ones unfold their output, one sample at a time.
    """
    if node.op_type == "ConvTranspose":
        kernel, source = shapes.get(node.input[1], ()), shapes.get(node.input[0], ())
        known = [n for n in (*kernel[1:], *source[2:]) if isinstance(n, int)]
        return 4 * math.prod(known), 0
    if node.domain == BLOCKED_DOMAIN:
        return 0, 0
    weight, output = shapes.get(node.input[1], ()), shapes.get(node.output[0], ())
    summed = weight[1:2] == (BATCH,)
    sizes = [n for n in (*weight[:1], 1 if summed else weight[1], *weight[2:], *output[1:]) if isinstance(n, int)]
    if not output or len(sizes) != len(weight) + len(output) - 1:
        return CONVOLUTION_WORKSPACE, 0
    kernel_size, positions = math.prod(sizes[1 : len(weight)]), math.prod(sizes[len(weight) + 1 :])
    step = math.prod(cast(Sequence[int], attribute(node, "strides", [1])))
    pads = sum(cast(Sequence[int], attribute(node, "pads", [0])))
    if math.prod(sizes[2 : len(weight)]) == step == 1 and pads == 0:
        return 0, 0  # a plain matrix product
    filters = sizes[0] // cast(int, attribute(node, "group", 1))
    if filters > positions:
        unfolded = 4 * positions * kernel_size
        return (ALIGNMENT, unfolded) if summed else (unfolded, 0)
    return CONVOLUTION_WORKSPACE, 0


def unfolded_sample(node: NodeProto, shapes: Shapes) -> int:
    """Bytes of a sample that a convolution has unfolded as a whole, which older releases do; 0 for other nodes."""
    if node.op_type != "Conv" or node.domain == BLOCKED_DOMAIN:
        return 0
    row, positions = shapes.get(node.input[1], ())[1:], shapes.get(node.output[0], ())[2:]
    if all(n == 1 for n in row[1:]):
        return 0
    return 4 * math.prod(n for n in (*row, *positions) if isinstance(n, int))


def _recurrent(node: NodeProto, shapes: Shapes, sizes: Mapping[str, Linear]) -> tuple[Linear, ...]:
    """What a recurrent layer takes: the gates of all steps in each direction, steps turned round, and states."""
    hidden, width = cast(int, attribute(node, "hidden_size")), shapes[node.input[1]][2]
    direction = attribute(node, "direction", "forward")
    entered = sizes.get(node.input[0]) or _floats(shapes.get(node.input[0], ()))

    def over_time(values: int) -> Linear:
        return -(-values * entered[0] // cast(int, width)), -(-values * entered[1] // cast(int, width))

    directions = 2 if direction == "bidirectional" else 1
    if node.op_type == "RNN":
        unasked = () if node.output[0] else (over_time(directions * hidden),)
        return *unasked, over_time(hidden), (0, 4 * hidden)
    pieces: list[Linear] = []
    for _ in range(directions):
        pieces += [over_time(_GATES[node.op_type] * hidden), *[(0, 4 * hidden)] * _STATES[node.op_type]]
    if direction != "forward":
        pieces += [entered, over_time(hidden)]
    return tuple(pieces)


def _is_last(node: NodeProto, shapes: Shapes) -> bool:
    axis, rank = cast(int, attribute(node, "axis", -1)), len(shapes.get(node.input[0], ()))
    return axis in (-1, rank - 1)


def _floats(shape: tuple[int | str, ...]) -> Linear:
    size = 4 * math.prod(n for n in shape if isinstance(n, int))
    return (0, size) if BATCH in shape else (size, 0)
