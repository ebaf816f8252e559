"""The weight tensors of a graph that evaluates several queries, each with weights of its own, in one run.

Layers that read the samples themselves take the filters of all queries in one tensor, query after query along the
first axis: the samples are read, and the blocks of the kernels filled, once for all. Every other parameter has one
tensor a query.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Final

from .layout import Layout

__all__ = ["MAX_QUERIES", "query_layout", "query_name"]

MAX_QUERIES: Final = 16


def query_name(parameter: str, query: int) -> str:
    """Name of the tensor of ``parameter`` for one query, where the tensors are separate."""
    return f"{parameter}.query{query}"


def query_layout(layout: Layout, queries: int, joint: Collection[str]) -> Layout:
    """The tensors as a layout.

    Args:
        layout: The parameters of one network.
        queries: Networks in one run; with 1 the result is ``layout``.
        joint: Names of the parameters that have one tensor for all queries.
    """
    if queries == 1:
        return layout
    tensors = []
    for parameter in layout.parameters:
        if parameter.name in joint:
            tensors.append(replace(parameter, shape=(queries * parameter.shape[0], *parameter.shape[1:])))
        else:
            tensors += [replace(parameter, name=query_name(parameter.name, k)) for k in range(queries)]
    return Layout(tuple(tensors))
