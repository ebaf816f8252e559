"""Rewrites a forward graph to the channels that stay: parameters, constants, targets of reshapes, stated shapes."""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, ValueInfoProto

from ..axis_labels import Labels
from ..channel_labels import ChannelLabels
from .editing import add_constant, attribute, constant_values, keep_live_nodes
from .infrastructure import GraphPass

__all__ = ["KeepChannels"]


class KeepChannels(GraphPass):
    """Narrows every axis to what stays of it.

    Args:
        traced: Labels of this very graph.
        removed: Roots of the labels that go.
    """

    def __init__(self, traced: ChannelLabels, removed: Collection[int]) -> None:
        self._traced = traced
        self._removed = np.array(sorted(removed), np.int64)
        self._groups = {name: norm.labels for norm in traced.grouped_norms for name in norm.inside}

    def requires(self, model: ModelProto) -> None:
        """The labels belong to the graph."""
        made = {name for node in model.graph.node for name in node.output}
        self.check(made <= set(self._traced.axes), "the labels are those of another graph")

    def kept(self, axis: Labels | None) -> NDArray[np.bool_] | None:
        """Which entries of an axis stay: ``bool[n]``; None for an axis without a fixed size."""
        return None if axis is None else ~np.isin(self._traced.labels.roots(axis), self._removed)

    def transform(self, model: ModelProto) -> bool:
        """Rewrite the graph; parameters are inputs, so only their types change."""
        graph = model.graph
        for value in (*graph.input, *graph.output, *graph.value_info):
            self._retype(value)
        constants = constant_values(graph)
        for node in graph.node:
            if node.op_type == "Conv" and cast(int, attribute(node, "group", 1)) > 1:
                self._regroup(node)
            if node.op_type == "Reshape" and node.input[1] in constants:
                target = self._target(node, constants[node.input[1]])
                if not np.array_equal(target, constants[node.input[1]]):
                    node.input[1] = add_constant(graph, f"fedzo.narrow.{node.output[0]}", target)
            for position, name in enumerate(node.input):
                axes = self._traced.constants.get((node.output[0], position))
                if axes is None:
                    continue
                keep = [np.flatnonzero(self.kept(axis)) for axis in axes]  # type: ignore[arg-type]
                narrow = constants[name][np.ix_(*keep)] if keep else constants[name]
                if narrow.shape != constants[name].shape:
                    node.input[position] = add_constant(graph, f"fedzo.narrow.{node.output[0]}.{position}", narrow)
        keep_live_nodes(graph)
        return bool(len(self._removed))

    def _retype(self, value: ValueInfoProto) -> None:
        axes = self._traced.axes.get(value.name)
        if axes is None:
            return
        for dim, axis in zip(value.type.tensor_type.shape.dim, axes, strict=True):
            kept = self.kept(axis)
            if kept is not None and dim.HasField("dim_value"):
                dim.dim_value = int(kept.sum())
        if value.name in self._groups:
            value.type.tensor_type.shape.dim[-1].dim_value = self._group_size(value.name)

    def _group_size(self, name: str) -> int:
        """Entries of one group in ``name``, a value inside a group normalisation."""
        kept, size = self.kept(self._groups[name]), cast(int, self._traced.shapes[name][-1])
        assert kept is not None
        return size * int(kept.sum()) // len(kept)

    def _regroup(self, node: NodeProto) -> None:
        """A depthwise convolution has as many groups as inputs are left."""
        inputs = self.kept(self._traced.axes[node.input[0]][1])
        groups = cast(int, attribute(node, "group", 1))
        if inputs is not None and len(inputs) == groups:
            next(item for item in node.attribute if item.name == "group").i = int(inputs.sum())

    def _target(self, node: NodeProto, target: NDArray[np.generic]) -> NDArray[np.int64]:
        out = np.array(target, np.int64).reshape(-1)
        for k, axis in enumerate(self._traced.axes[node.output[0]]):
            kept = self.kept(axis)
            if kept is not None and out[k] == len(kept):
                out[k] = int(kept.sum())
        if node.output[0] in self._groups and out[-1] > 0:
            out[-1] = self._group_size(node.output[0])
        return out
