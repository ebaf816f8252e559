"""Which axes of a parameter are summed over: their sizes are its fan-in, whatever form the layer has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from onnx import ModelProto, NodeProto

from ..protocol.artifact.layout import Layout
from .passes.editing import attribute

__all__ = ["fan_in_axes"]

_RECURRENT = ("GRU", "LSTM", "RNN")


def fan_in_axes(model: ModelProto, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Of every weight the axes that its layer sums over; parameters that are not multiplied like that are left out.

    A weight may be used more than once, if all uses sum over the same axes.

    Args:
        model: A graph in which every parameter is a value under its layout name.
        layout: Its parameters.
    """
    ranks = {p.name: len(p.shape) for p in layout.parameters}
    # A value that is a parameter with its axes in another order: where each of them comes from.
    orders = {name: (name, tuple(range(rank))) for name, rank in ranks.items()}
    found: dict[str, set[tuple[int, ...]]] = {}
    for node in model.graph.node:
        if node.op_type == "Transpose" and node.input[0] in orders:
            name, order = orders[node.input[0]]
            perm = cast(Sequence[int], attribute(node, "perm", list(range(len(order)))[::-1]))
            orders[node.output[0]] = (name, tuple(order[axis] for axis in perm))
            continue
        for place, value in enumerate(node.input):
            if value in orders:
                name, order = orders[value]
                axes = tuple(sorted(order[axis] for axis in _summed(node, place, len(order))))
                if axes:
                    found.setdefault(name, set()).add(axes)
    return {name: axes.pop() for name, axes in found.items() if len(axes) == 1}


def _summed(node: NodeProto, place: int, rank: int) -> Iterator[int]:
    """Axes of input ``place`` that the node sums over."""
    if rank < 2:  # an offset, or a factor
        return
    if node.op_type == "Conv" and place == 1:
        yield from range(1, rank)
    elif node.op_type == "ConvTranspose" and place == 1:
        yield 0
    elif node.op_type == "MatMul":
        yield rank - 1 if place == 0 else rank - 2
    elif node.op_type == "Gemm" and place < 2:
        flag = cast(int, attribute(node, "transA" if place == 0 else "transB", 0))
        yield 1 - flag if place == 0 else flag
    elif node.op_type in _RECURRENT and place in (1, 2):
        yield rank - 1
