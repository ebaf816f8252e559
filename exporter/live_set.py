"""How much memory a graph needs: the live tensors, node by node in file order, as linear functions of the batch.

onnxruntime, asked for priority-based order and with ``enable_mem_reuse`` off, runs nodes as the file lists them, takes
a tensor from its arena when a node writes it and gives it back after the last use. Reshapes alias their input, and
activations are written over it if nothing else needs it. Sums, products and ``ScatterElements`` are not, although
their kernels offer it (microsoft/onnxruntime#32062). Reuse that is planned ahead needs more, not less: a buffer that a
later node is to take over stays allocated in between, a third more for the blocks of a ResNet.

Tensor sizes come from running the graph at three batch sizes, so they hold for every operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from ..protocol.errors import ConfigError
from .blocked_layout import BLOCKED_DOMAIN
from .forward import BATCH
from .passes.editing import attribute, input_names, value_shapes
from .sessions import run_every_value

__all__ = ["Linear", "envelope_of", "live_envelope", "measured_sizes"]

Linear = tuple[int, int]
"""Bytes as ``(fixed, per_sample)``."""

ALIGNMENT = 256
"""The arena of onnxruntime hands out multiples of this."""

ALIASES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})
_IN_PLACE = frozenset(
    {"Relu", "LeakyRelu", "Elu", "Celu", "Selu", "ThresholdedRelu", "Clip", "Sigmoid", "HardSigmoid", "Tanh"}
    | {"Softplus", "Softsign"}
)
CONVOLUTION_WORKSPACE = 64 << 10
"""Bytes a thread that a convolution takes from the arena to unfold its input piece by piece."""


def measured_sizes(model: ModelProto, feeds: Callable[[int], Mapping[str, NDArray[np.generic]]]) -> dict[str, Linear]:
    """Size of every value that the graph computes.

    Args:
        model: The graph.
        feeds: Yields its inputs for a batch size.

    Returns:
        ``(fixed, per_sample)`` bytes by name of the value, not rounded.

    Raises:
        ConfigError: A size does not grow linearly with the batch: the model mixes samples.
    """
    one, two, three = ({k: v.nbytes for k, v in run_every_value(model, feeds(b)).items()} for b in (1, 2, 3))
    sizes: dict[str, Linear] = {}
    for name, size in two.items():
        per_sample = three[name] - size
        if size - one[name] != per_sample or per_sample < 0:
            raise ConfigError(
                f"the size of {name!r} is {one[name]}, {size} and {three[name]} bytes for batches of 1, 2 and 3",
                hint="every sample must be processed on its own",
            )
        sizes[name] = (size - 2 * per_sample, per_sample)
    return sizes


def live_envelope(model: ModelProto, sizes: Mapping[str, Linear]) -> tuple[Linear, ...]:
    """Largest live sets of a graph over all batch sizes.

    Constants count as fixed, and so does the workspace of convolutions on one thread. Inputs do not, nor do the parts
    into which ``w`` and ``index`` are split.

    Args:
        model: The graph.
        sizes: Size of every computed value, from :func:`measured_sizes`.

    Returns:
        Pairs ``(fixed_bytes, bytes_per_sample)``; at batch ``B`` the largest ``fixed + per_sample * B`` holds.
    """
    graph = model.graph
    constants = sum(_rounded((len(t.raw_data) or t.ByteSize(), 0))[0] for t in graph.initializer)
    buffers = _Buffers({value.name for value in graph.output})
    for name in (*input_names(graph), *(tensor.name for tensor in graph.initializer)):
        buffers.foreign(name)
    for position, node in enumerate(graph.node):
        for name in node.input:
            buffers.last_use[name] = position
    shapes = value_shapes(model)
    # The arena keeps what a node gave back, in a piece that is too small for the tensors: counted at every node.
    workspaces = envelope_of([(0, 0), *(_workspace(node, shapes) for node in graph.node)])
    points: list[Linear] = []
    for position, node in enumerate(graph.node):
        _allocate(node, position, buffers, sizes)
        live = [buffers.size[b] for b in buffers.live]
        fixed, per_sample = constants + sum(f for f, _ in live), sum(p for _, p in live)
        points += [(fixed + f, per_sample + p) for f, p in workspaces]
        buffers.free(position)
    return envelope_of(points)


def envelope_of(points: Iterable[Linear]) -> tuple[Linear, ...]:
    """The points that are largest for some batch of at least 1, by falling ``fixed``."""
    hull: list[Linear] = []
    for fixed, per_sample in sorted(set(points), key=lambda p: (-p[0] - p[1], -p[1])):
        if hull and per_sample <= hull[-1][1]:
            continue
        # Drop the last point when the new one overtakes the one before it no later than the last one does.
        while len(hull) > 1:
            (f0, p0), (f1, p1) = hull[-2], hull[-1]
            if (f0 - fixed) * (p1 - p0) > (f0 - f1) * (per_sample - p0):
                break
            hull.pop()
        hull.append((fixed, per_sample))
    return tuple(hull)


@dataclass
class _Buffers:
    """Tensors that share memory share a buffer; a buffer lives until the last use of any of its names."""

    outputs: set[str]
    of: dict[str, str] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    size: dict[str, Linear] = field(default_factory=dict)
    live: set[str] = field(default_factory=set)
    last_use: dict[str, int] = field(default_factory=dict)

    def foreign(self, name: str) -> None:
        """A value whose memory is counted elsewhere."""
        self.of[name] = name
        self.names[name] = [name]
        self.size[name] = (0, 0)

    def new(self, name: str, size: Linear) -> None:
        self.foreign(name)
        self.size[name] = _rounded(size)
        self.live.add(name)

    def share(self, name: str, source: str) -> None:
        self.of[name] = self.of[source]
        self.names[self.of[source]].append(name)

    def reusable(self, source: str, position: int) -> bool:
        """Whether the node at ``position`` is the last to need the buffer of ``source``."""
        owner = self.of[source]
        names = self.names[owner]
        return owner in self.live and all(self.last_use.get(n, -1) <= position and n not in self.outputs for n in names)

    def free(self, position: int) -> None:
        for owner in list(self.live):
            names = self.names[owner]
            if all(self.last_use.get(n, -1) <= position and n not in self.outputs for n in names):
                self.live.discard(owner)


def _allocate(node: NodeProto, position: int, buffers: _Buffers, sizes: Mapping[str, Linear]) -> None:
    if node.op_type == "Split" and node.input[0] in ("w", "index"):
        for name in node.output:
            buffers.foreign(name)
        return
    for name in node.output:
        if not name:
            continue
        size = sizes[name]
        if node.op_type in ALIASES and name == node.output[0] and name not in buffers.outputs:
            buffers.share(name, node.input[0])
            continue
        if node.op_type in _IN_PLACE:
            candidates = [n for n in node.input if n and sizes.get(n) == size and buffers.reusable(n, position)]
            if candidates:
                buffers.share(name, candidates[0])
                continue
        buffers.new(name, size)


def _workspace(node: NodeProto, shapes: Mapping[str, tuple[int | str, ...]]) -> Linear:
    """Bytes that a node takes for itself on one thread.

    Convolutions unfold their input (``MlasConvPrepare``); in one that makes a weight's gradient the samples are what it
    sums over. Transposed ones unfold their output, one sample at a time.
    """
    if node.op_type == "ConvTranspose":
        kernel, source = shapes.get(node.input[1], ()), shapes.get(node.input[0], ())
        known = [n for n in (*kernel[1:], *source[2:]) if isinstance(n, int)]
        return _rounded((4 * math.prod(known), 0))
    if node.op_type != "Conv" or node.domain == BLOCKED_DOMAIN:
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
        return (ALIGNMENT, unfolded) if summed else _rounded((unfolded, 0))
    return CONVOLUTION_WORKSPACE, 0


def _rounded(size: Linear) -> Linear:
    """An upper bound of the size rounded up to the alignment, for every batch."""
    fixed, per_sample = size
    if per_sample % ALIGNMENT:
        return fixed + ALIGNMENT - 1, per_sample
    return -(-fixed // ALIGNMENT) * ALIGNMENT, per_sample
