"""Cuts a network that is one chain of layers into stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx import ModelProto, NodeProto

from ..protocol.artifact.layout import Layout
from ..protocol.artifact.stages import MAX_STAGES, Stage
from .cuts import multiply_accumulates
from .forward import BATCH
from .passes.chain_rules import CHAIN_OPERATORS, follows
from .passes.editing import value_shapes
from .units import UnitNode, scales_its_bias

__all__ = ["StagePoint", "find_stages"]


@dataclass(frozen=True, slots=True)
class StagePoint:
    """A stage and the values at its ends.

    Attributes:
        stage: As the manifest describes it.
        value: Name of what enters it in the forward graph.
        output: Name of what leaves it.
        grid: Shape of one sample of its output before it is made flat: channels, then positions.
    """

    stage: Stage
    value: str
    output: str
    grid: tuple[int, ...]


def find_stages(model: ModelProto, layout: Layout, units: Sequence[UnitNode]) -> tuple[StagePoint, ...]:
    """The stages of a network, front to back.

    A chain is a network in which every value has one consumer. Its layers are convolutions of one group over one or two
    axes and fully connected layers on rows of numbers, all with a bias that counts once or with none; between them are
    the operators that :mod:`.passes.chain_rules` can follow backwards.

    Args:
        model: A forward graph.
        layout: Its parameters, in the order of first use.
        units: Its unit layers.

    Returns:
        Nothing if the network is no such chain.
    """
    chain = _chain(model)
    layers = {unit.output: unit for unit in units}
    position = {parameter.name: k for k, parameter in enumerate(layout.parameters)}
    shapes, constants = value_shapes(model), {tensor.name for tensor in model.graph.initializer}
    transposed = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Transpose"}
    begins, owned = [], []
    for place, node in enumerate(chain):
        named = [transposed.get(name, name) for name in node.input if name]
        owned.append(sorted(position[name] for name in named if name in position))
        unit = layers.get(node.output[0])
        if unit is not None:
            if unit.layer.groups != 1 or (unit.window is None and (unit.rank != 2 or unit.positions != 1)):
                return ()
            if scales_its_bias(node):
                return ()
            begins.append(place)
        elif node.op_type not in CHAIN_OPERATORS or not follows(node, shapes, constants, set(position)):
            return ()
    if not begins or len(begins) > MAX_STAGES:
        return ()
    if sorted(k for found in owned for k in found) != list(range(len(layout.parameters))):
        return ()
    if any(owned[place] for place in range(begins[0])):
        return ()
    points: list[StagePoint] = []
    value = "x"
    for number, begin in enumerate(begins):
        end = begins[number + 1] if number + 1 < len(begins) else len(chain)
        mine = [k for found in owned[begin:end] for k in found]
        first = points[-1].stage.end_parameter if points else 0
        if sorted(mine) != list(range(first, first + len(mine))):
            return ()
        output = chain[end - 1].output[0]
        ends = [_sample_shape(shapes, name) for name in (value, output)]
        if not all(ends):
            return ()
        cost = multiply_accumulates(layers[chain[begin].output[0]], layout)
        stage = Stage(number, first, first + len(mine), ends[0], ends[1], cost)
        points.append(StagePoint(stage, value, output, _grid(chain[begin:end], shapes)))
        value = output
    return tuple(points)


def _chain(model: ModelProto) -> list[NodeProto]:
    """Nodes from ``x`` to the logits; nothing if a value on the way has more than one consumer, or is an output."""
    consumers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    chain: list[NodeProto] = []
    value, last = "x", model.graph.output[0].name
    while value != last:
        found = consumers.get(value, [])
        if len(found) != 1 or [name for name in found[0].output[1:] if name]:
            return []
        chain.append(found[0])
        value = found[0].output[0]
    return [] if consumers.get(last) else chain


def _sample_shape(shapes: Mapping[str, tuple[int | str, ...]], name: str) -> tuple[int, ...]:
    shape = shapes.get(name, ())
    sizes = tuple(n for n in shape[1:] if isinstance(n, int))
    return sizes if shape[:1] == (BATCH,) and len(sizes) == len(shape) - 1 else ()


def _grid(nodes: Sequence[NodeProto], shapes: Mapping[str, tuple[int | str, ...]]) -> tuple[int, ...]:
    """The shape of the last value of several axes that holds the same numbers as the last value."""
    last = _sample_shape(shapes, nodes[-1].output[0])
    for node in reversed(nodes):
        shape = _sample_shape(shapes, node.output[0])
        if math.prod(shape) != math.prod(last):
            break
        if len(shape) > 1:
            return shape
        if node.op_type not in ("Flatten", "Reshape", "Squeeze", "Unsqueeze", "Identity"):
            break
    return last
