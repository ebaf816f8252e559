"""Picks where to cut a network, so that probes of the later layers can start from stored activations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from onnx import ModelProto, NodeProto

from ..protocol.artifact.cut import Cut
from ..protocol.artifact.layout import Layout
from .forward import BATCH
from .passes.editing import value_shapes
from .units import UnitNode

__all__ = ["CutPoint", "cut_points", "find_cut", "multiply_accumulates"]


@dataclass(frozen=True, slots=True)
class CutPoint:
    """A cut and the value that crosses it.

    Attributes:
        cut: As the manifest describes it.
        value: Name of the features in the forward graph.
    """

    cut: Cut
    value: str


def multiply_accumulates(unit: UnitNode, layout: Layout) -> int:
    """Multiplications that a unit layer takes for one sample."""
    shape = layout.parameters[layout.position_of(unit.layer.parameter)].shape
    positions = unit.positions if unit.window is None else math.prod(unit.window.output_sizes)
    return math.prod(shape) * positions


def cut_points(model: ModelProto, layout: Layout, units: Sequence[UnitNode]) -> Iterator[CutPoint]:
    """Every place where a network can be cut, front to back.

    A value can be the cut if it holds a part of every sample and nothing behind it needs the input or a parameter in
    front of it.

    Args:
        model: A forward graph.
        layout: Its parameters, in the order of first use.
        units: Its unit layers; what other nodes cost is left out.
    """
    producers = {name: node for node in model.graph.node for name in node.output if name}
    position = {parameter.name: k for k, parameter in enumerate(layout.parameters)}
    costs = {unit.output: multiply_accumulates(unit, layout) for unit in units}
    total, logits, shapes = sum(costs.values()), model.graph.output[0].name, value_shapes(model)
    for node in model.graph.node:
        for value in node.output:
            shape = _sample_shape(shapes.get(value, ()))
            if not shape or value == logits:
                continue
            behind = _needed(logits, value, producers)
            front = {position[name] for name in _needed(value, "", producers) if name in position}
            after = {position[name] for name in behind if name in position}
            if "x" in behind or not front or not after or max(front) >= min(after):
                continue
            suffix = sum(cost for name, cost in costs.items() if name in behind)
            if suffix < total:
                yield CutPoint(Cut(min(after), shape, total - suffix, suffix), value)


def find_cut(model: ModelProto, layout: Layout, units: Sequence[UnitNode]) -> CutPoint | None:
    """The cut that saves most.

    It has the largest product of two shares: that of the parameters behind the cut (how many coordinates gain) and
    that of the multiplications in front of it (what each of their probes saves). Between equals the smallest value
    wins, then the latest.

    Args:
        model: A forward graph.
        layout: Its parameters, in the order of first use.
        units: Its unit layers.

    Returns:
        None if the layers cannot be separated.
    """

    def gain(entry: tuple[int, CutPoint]) -> tuple[int, int, int]:
        order, cut = entry[0], entry[1].cut
        coordinates = sum(p.size for p in layout.parameters[cut.first_parameter :])
        return coordinates * cut.prefix_multiply_accumulates, -math.prod(cut.feature_shape), order

    best = max(enumerate(cut_points(model, layout, units)), key=gain, default=None)
    return best[1] if best else None


def _sample_shape(shape: tuple[int | str, ...]) -> tuple[int, ...]:
    """Shape of one sample of a value whose first axis alone is the batch, else nothing."""
    sizes = tuple(n for n in shape[1:] if isinstance(n, int))
    return sizes if shape[:1] == (BATCH,) and len(sizes) == len(shape) - 1 else ()


def _needed(name: str, stop: str, producers: Mapping[str, NodeProto]) -> set[str]:
    """All values that ``name`` is computed from, itself included, without looking behind ``stop``."""
    needed: set[str] = set()
    waiting = [name]
    while waiting:
        value = waiting.pop()
        if value in needed or value == stop:
            continue
        needed.add(value)
        if value in producers:
            waiting.extend(name for name in producers[value].input if name)
    return needed
