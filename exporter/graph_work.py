"""Counts what a graph computes and moves, for the time that `fedzo plan` predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import ModelProto

from ..protocol.artifact.graph_work import GraphWork
from ..protocol.artifact.layout import Layout
from .cuts import multiply_accumulates
from .live_set import ALIASES, Linear
from .units import UnitNode

__all__ = ["graph_work"]


def graph_work(
    model: ModelProto, layout: Layout, units: Sequence[UnitNode], sizes: Mapping[str, Linear], input_bytes: int
) -> GraphWork:
    """The work of a graph.

    Args:
        model: The graph.
        layout: Its parameters.
        units: Its unit layers, whose products are counted.
        sizes: Bytes of every value that it computes, from :func:`~.live_set.measured_sizes`.
        input_bytes: Of ``x``, for one sample.
    """
    known = {**sizes, "x": (0, input_bytes)}
    operators, fixed, per_sample = 0, 0, 0
    for node in model.graph.node:
        if node.op_type in ALIASES:
            continue
        operators += 1
        for name in (*node.input, *node.output):
            size = known.get(name, (0, 0))
            fixed, per_sample = fixed + size[0], per_sample + size[1]
    products = sum(multiply_accumulates(unit, layout) for unit in units)
    return GraphWork(products, per_sample, fixed, operators)
