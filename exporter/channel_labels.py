"""Which channels of a graph must be removed together.

Every index along every axis of every value gets a label. Operators make labels equal (a sum ties the channels of both
operands), carry them on (a rectifier, a pooling, a flattening) or pin them (the logits, a grouped convolution): a
channel is a set of equal labels that nothing pins. It is the dependency graph of Fang et al., "DepGraph: Towards any
structural pruning", CVPR 2023, on the ONNX graph, so that built-in and imported models are treated alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from onnx import ModelProto, NodeProto

from .axis_labels import AxisLabels, Labels, merged, split
from .passes.editing import attribute, constant_values, value_shapes

__all__ = ["ChannelLabels", "GroupedNorm", "trace_channels"]

Shape = tuple[int | str, ...]
Axes = list[Labels | None]
"""Labels of a value, one array an axis; None for the batch axis and others of no fixed size."""

# fmt: off
_CARRIED = frozenset((
    "Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Softplus", "Softsign",
    "Erf", "Exp", "Log", "Sqrt", "Abs", "Neg", "Reciprocal", "Sign", "Floor", "Ceil", "Round", "Identity", "Cast",
    "Dropout", "Clip", "Sin", "Cos", "Not", "ThresholdedRelu",
))
_BROADCAST = frozenset((
    "Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Sum", "Mean", "Where", "PRelu", "Less", "Greater", "Equal",
    "And", "Or",
))
_POOLS = frozenset((
    "MaxPool", "AveragePool", "LpPool", "GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool",
))
_VIEWS = frozenset(("Reshape", "Flatten", "Squeeze", "Unsqueeze"))
_REDUCTIONS = frozenset((
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare",
))
_RESIZED = frozenset(("Pad", "Slice", "Resize", "Split"))
# fmt: on


@dataclass(frozen=True, eq=False)
class GroupedNorm:
    """A group normalisation: its channels must stay a multiple of its groups.

    Attributes:
        labels: Of its channels.
        groups: Number of groups.
        name: Of the node.
        inside: Values that have the groups as an axis: in front of the normalisation and behind it.
    """

    labels: Labels
    groups: int
    name: str
    inside: tuple[str, str]


class ChannelLabels:
    """The labels of a graph.

    Attributes:
        axes: Of every value and parameter, by name.
        constants: Of every use of a constant, by the node's first output and the input's position.
        labels: What is equal and what is pinned.
        grouped_norms: The group normalisations.
        shapes: Shapes of the values.
    """

    def __init__(self, model: ModelProto) -> None:
        self.axes: dict[str, Axes] = {}
        self.constants: dict[tuple[str, int], Axes] = {}
        self.labels = AxisLabels()
        self.grouped_norms: list[GroupedNorm] = []
        self.shapes: dict[str, Shape] = value_shapes(model)
        self._constants = constant_values(model.graph)
        self._users: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)
        self._restored: dict[str, Axes] = {}  # second reshape of a group normalisation -> axes in front of the first
        for value in model.graph.input:
            if value.name != "x" and value.name not in self._constants:
                self.axes[value.name] = [self.labels.fresh(cast(int, n)) for n in self.shapes[value.name]]
        self.axes["x"] = self._still("x")
        for node in model.graph.node:
            self._node(node)
        for axis in self.axes[model.graph.output[0].name]:
            self._pin(axis, "it yields the logits")

    def _node(self, node: NodeProto) -> None:
        if node.output[0] in self._restored:
            self.axes[node.output[0]] = self._restored[node.output[0]]
            return
        if any(name and name not in self.shapes for name in node.output) or any(
            name and name not in self.axes and name not in self._constants for name in node.input
        ):
            self._refuse(node)
            return
        rules: dict[str, Callable[[NodeProto], Axes | None]] = {
            "Conv": self._convolution,
            "Gemm": self._gemm,
            "MatMul": self._product,
            "Transpose": self._transpose,
            "Concat": self._concat,
            "InstanceNormalization": self._instance_normalisation,
            "LayerNormalization": self._layer_normalisation,
            "Softmax": self._softmax,
            "LogSoftmax": self._softmax,
            "Gather": self._gather,
            **dict.fromkeys(_CARRIED, lambda n: list(self._axes(n, 0))),
            **dict.fromkeys(_BROADCAST, self._broadcast),
            **dict.fromkeys(_POOLS, self._pool),
            **dict.fromkeys(_VIEWS, self._view),
            **dict.fromkeys(_REDUCTIONS, self._reduction),
            **dict.fromkeys(_RESIZED, self._resized),
        }
        found = rules[node.op_type](node) if node.op_type in rules and not node.domain else None
        if found is None:
            self._refuse(node)
            return
        for name in node.output:
            if name:
                self.axes[name] = found if name == node.output[0] else self._like(found, name)

    def _axes(self, node: NodeProto, position: int) -> Axes:
        """Labels of an input; each use of a constant has its own."""
        name = node.input[position]
        if name in self.axes:
            return self.axes[name]
        key = (node.output[0], position)
        if key not in self.constants:
            self.constants[key] = [self.labels.fresh(n) for n in self._constants[name].shape]
        return self.constants[key]

    def _still(self, name: str) -> Axes:
        """Axes of which nothing can be removed."""
        return [np.zeros(n, np.int64) if isinstance(n, int) else None for n in self.shapes.get(name, ())]

    def _like(self, axes: Axes, name: str) -> Axes:
        """``axes`` where the value ``name`` has the same sizes, pinned elsewhere."""
        return [
            a if a is not None and s is not None and len(a) == len(s) else s
            for a, s in zip(axes, self._still(name), strict=False)
        ]

    def _pin(self, axis: Labels | None, reason: str) -> None:
        if axis is not None:
            self.labels.pin(axis, reason)

    def _tie(self, a: Labels | None, b: Labels | None, reason: str) -> None:
        """Make two axes equal; an axis without a fixed size pins the other."""
        if a is None or b is None:
            self._pin(a if b is None else b, reason)
        else:
            self.labels.tie(a, b, reason)

    def _refuse(self, node: NodeProto) -> None:
        """An operator that channels are not followed through: nothing around it is removed."""
        for position, name in enumerate(node.input):
            if name and (name in self.axes or name in self._constants):
                for axis in self._axes(node, position):
                    self._pin(axis, f"{node.op_type} {node.name or node.output[0]!r} needs all of it")
        for name in node.output:
            self.axes[name] = self._still(name)

    # --- operators ---------------------------------------------------------------------------------------------------

    def _convolution(self, node: NodeProto) -> Axes:
        data, weight, groups = self._axes(node, 0), self._axes(node, 1), cast(int, attribute(node, "group", 1))
        reason = f"the convolution {node.output[0]!r} has {groups} groups"
        units, inputs = cast(Labels, weight[0]), cast(Labels, data[1])
        for axis in weight[2:]:
            self._pin(axis, reason)
        if groups == 1:
            self._tie(weight[1], inputs, reason)
        elif len(cast(Labels, weight[1])) == 1:
            # Depthwise: a group is one channel, its outputs go with it.
            self._pin(weight[1], reason)
            self._tie(units, np.repeat(inputs, len(units) // groups), reason)
        else:
            for axis in (weight[0], weight[1], inputs):
                self._pin(axis, reason)
        if len(node.input) > 2 and node.input[2]:
            self._tie(self._axes(node, 2)[0], units, reason)
        return [data[0], units, *self._still(node.output[0])[2:]]

    def _gemm(self, node: NodeProto) -> Axes:
        a = self._axes(node, 0)[:: -1 if attribute(node, "transA", 0) else 1]
        b = self._axes(node, 1)[:: -1 if attribute(node, "transB", 0) else 1]
        reason = f"the product {node.output[0]!r} needs it"
        self._tie(a[1], b[0], reason)
        out = [a[0], b[1]]
        if len(node.input) > 2 and node.input[2]:
            self._join(out, self._axes(node, 2), reason)
        return out

    def _product(self, node: NodeProto) -> Axes | None:
        a, b = self._axes(node, 0), self._axes(node, 1)
        if len(a) < 2 or len(b) < 2:
            return None
        reason = f"the product {node.output[0]!r} needs it"
        self._tie(a[-1], b[-2], reason)
        front: Axes = self._still(node.output[0])[:-2]
        for other in (a[:-2], b[:-2]):
            front = self._join(front, other, reason)
        return [*front, a[-2], b[-1]]

    def _transpose(self, node: NodeProto) -> Axes:
        axes = self._axes(node, 0)
        order = cast(Sequence[int], attribute(node, "perm", list(range(len(axes)))[::-1]))
        return [axes[k] for k in order]

    def _concat(self, node: NodeProto) -> Axes:
        axis = cast(int, attribute(node, "axis", 0)) % len(self.shapes[node.output[0]])
        parts = [self._axes(node, position) for position in range(len(node.input))]
        out = list(parts[0])
        for part in parts[1:]:
            for k in range(len(out)):
                if k != axis:
                    self._tie(out[k], part[k], f"{node.output[0]!r} joins it with something else")
        known = [part[axis] for part in parts]
        out[axis] = np.concatenate([a for a in known if a is not None]) if all(a is not None for a in known) else None
        return out

    def _broadcast(self, node: NodeProto) -> Axes:
        reason = f"{node.op_type} {node.output[0]!r} combines it with something that keeps its size"
        out: Axes | None = None
        for position, name in enumerate(node.input):
            if name:
                axes = self._axes(node, position)
                out = list(axes) if out is None else self._join(out, axes, reason)
        return out or []

    def _join(self, a: Axes, b: Axes, reason: str) -> Axes:
        """Axes of a broadcast: equal sizes are tied, a size of 1 follows the other."""
        if len(a) < len(b):
            a, b = b, a
        out = list(a)
        for k in range(1, len(b) + 1):
            x, y = a[-k], b[-k]
            if y is not None and len(y) == 1:
                self._pin(y, reason)
            elif x is not None and len(x) == 1:
                self._pin(x, reason)
                out[-k] = y
            else:
                self._tie(x, y, reason)
                out[-k] = x if x is None or (x > 0).any() else y
        return out

    def _pool(self, node: NodeProto) -> Axes:
        return [*self._axes(node, 0)[:2], *self._still(node.output[0])[2:]]

    def _view(self, node: NodeProto) -> Axes | None:
        source, target = self._axes(node, 0), self._still(node.output[0])
        if node.op_type == "Reshape" and self._grouped(node, source):
            return target
        return self._regrouped(node, source, target)

    def _grouped(self, node: NodeProto, source: Axes) -> bool:
        """Reshape, InstanceNormalization over groups with equal constants, Reshape back: a group normalisation."""
        norm = self._only_user(node.output[0], "InstanceNormalization")
        back = self._only_user(norm.output[0], "Reshape") if norm is not None else None
        shape, inner = self.shapes.get(node.input[0], ()), self.shapes.get(node.output[0], ())
        if norm is None or back is None or self.shapes.get(back.output[0]) != shape or len(inner) < 3:
            return False
        affine = [self._constants.get(name) for name in norm.input[1:3]]
        channels, groups = source[1], inner[1]
        if channels is None or not isinstance(groups, int) or groups >= len(channels) or len(channels) % groups:
            return False
        if any(value is None or (value != value.flat[0]).any() for value in affine):
            return False
        self.grouped_norms.append(GroupedNorm(channels, groups, back.output[0], (node.output[0], norm.output[0])))
        self._restored[norm.output[0]] = self._still(node.output[0])
        self._restored[back.output[0]] = source
        return True

    def _only_user(self, name: str, op: str) -> NodeProto | None:
        users = self._users.get(name, [])
        return users[0] if len(users) == 1 and users[0].op_type == op else None

    def _regrouped(self, node: NodeProto, source: Axes, target: Axes) -> Axes | None:
        """Labels behind a change of shape: blocks of axes with equal products are matched front to back."""
        a, b = (
            self.shapes.get(node.input[0], tuple(0 if x is None else len(x) for x in source)),
            self.shapes[node.output[0]],
        )
        front = [(n, axis) for n, axis in zip(a, source, strict=True) if n != 1]
        sizes = [n for n in b if n != 1]
        reason = f"{node.op_type} {node.output[0]!r} takes it apart"
        for axis in source:
            if axis is not None and len(axis) == 1:
                self._pin(axis, reason)
        out: Axes = []
        i = j = 0
        while i < len(front) and j < len(sizes):
            if isinstance(front[i][0], str) or isinstance(sizes[j], str):
                if front[i][0] != sizes[j]:
                    return None
                out.append(None)
                i, j = i + 1, j + 1
                continue
            m, n = i + 1, j + 1
            while (left := _size([size for size, _ in front[i:m]])) != (right := _size(sizes[j:n])):
                m, n = (m + 1, n) if left < right else (m, n + 1)
                if min(left, right) < 0 or m > len(front) or n > len(sizes):
                    return None
            block = merged(self.labels, [cast(Labels, axis) for _, axis in front[i:m]], reason)
            out += split(self.labels, block, cast(list[int], sizes[j:n]), reason)
            i, j = m, n
        if i < len(front) or j < len(sizes):
            return None
        found = iter(out)
        return [axis if b[k] == 1 else next(found) for k, axis in enumerate(target)]

    def _instance_normalisation(self, node: NodeProto) -> Axes:
        axes = self._axes(node, 0)
        for position in (1, 2):
            self._tie(self._axes(node, position)[0], axes[1], f"the normalisation {node.output[0]!r} needs it")
        return list(axes)

    def _layer_normalisation(self, node: NodeProto) -> Axes:
        axes = self._axes(node, 0)
        for position in range(1, len(node.input)):
            self._join(list(axes), self._axes(node, position), f"the normalisation {node.output[0]!r} needs it")
        return list(axes)

    def _softmax(self, node: NodeProto) -> Axes:
        axes = list(self._axes(node, 0))
        self._pin(axes[cast(int, attribute(node, "axis", -1))], f"{node.output[0]!r} is a softmax over it")
        return axes

    def _reduction(self, node: NodeProto) -> Axes | None:
        axes, shape = self._axes(node, 0), self.shapes[node.output[0]]
        if len(node.input) > 1:
            numbers = self._constants.get(node.input[1])
            reduced = None if numbers is None else [int(k) for k in numbers.ravel()]
        else:
            reduced = list(cast(Sequence[int], attribute(node, "axes", list(range(len(axes))))))
        if reduced is None:
            return None
        gone = {k % len(axes) for k in reduced}
        if len(shape) == len(axes):
            still = self._still(node.output[0])
            return [still[k] if k in gone else axis for k, axis in enumerate(axes)]
        return [axis for k, axis in enumerate(axes) if k not in gone]

    def _resized(self, node: NodeProto) -> Axes | None:
        """Axes whose size changes are pinned; without a change an axis passes, unless the node may reorder it."""
        axes, shape = self._axes(node, 0), self.shapes[node.input[0]]
        for name in node.output:
            if len(self.shapes[name]) != len(axes):
                return None
        still = self._still(node.output[0])
        out: Axes = []
        for k, axis in enumerate(axes):
            same = all(self.shapes[name][k] == shape[k] for name in node.output) and node.op_type != "Slice"
            if node.op_type == "Slice":
                same = len(node.input) > 3 and not self._sliced(node, k, len(axes))
            if not same:
                self._pin(axis, f"{node.op_type} {node.output[0]!r} takes a part of it")
            out.append(axis if same else still[k])
        return out

    def _sliced(self, node: NodeProto, axis: int, rank: int) -> bool:
        chosen = self._constants.get(node.input[3])
        return chosen is None or axis in {int(k) % rank for k in chosen.ravel()}

    def _gather(self, node: NodeProto) -> Axes | None:
        axes, index = self._axes(node, 0), self._constants.get(node.input[1])
        axis = cast(int, attribute(node, "axis", 0)) % max(1, len(axes))
        if index is None or index.ndim > 1 or not axes:
            return None
        self._pin(axes[axis], f"Gather {node.output[0]!r} takes a part of it")
        inside: Axes = [np.zeros(index.size, np.int64)] if index.ndim else []
        return [*axes[:axis], *inside, *axes[axis + 1 :]]


def _size(shape: Sequence[int | str]) -> int:
    """Product of a block of axes, -1 if one has no fixed size."""
    return -1 if any(isinstance(n, str) for n in shape) else math.prod(cast(Sequence[int], shape))


def trace_channels(model: ModelProto) -> ChannelLabels:
    """Follow the channels of a forward graph.

    Args:
        model: Every trainable tensor is an input of the graph; ``x`` and the first output keep all their entries.
    """
    return ChannelLabels(model)
