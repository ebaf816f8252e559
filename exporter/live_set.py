"""How much memory a graph needs: its tensors, node by node in file order, as linear functions of the batch.

onnxruntime, asked for priority-based order and with ``enable_mem_reuse`` off, runs nodes as the file lists them, takes
a tensor from its arena when a node writes it and gives it back after the last use. Reshapes alias their input, and
activations are written over it if nothing else needs it. Sums, products and ``ScatterElements`` are not, although
their kernels offer it (microsoft/onnxruntime#32062). Reuse that is planned ahead needs more, not less: a buffer that a
later node is to take over stays allocated in between, a third more for the blocks of a ResNet.

What kernels take for themselves is in :mod:`.workspaces`, what is lost between the pieces of the arena in
:mod:`.arena`. Tensor sizes come from running the graph at three batch sizes, so they hold for every operator.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from ..protocol.artifact.graph_files import GraphMemory
from ..protocol.errors import ConfigError
from .arena import ALIGNMENT, Request, arena_bytes
from .passes.editing import input_names, value_shapes
from .sessions import run_every_value
from .workspaces import unfolded_sample, workspace_of

__all__ = ["Linear", "constant_bytes", "envelope_of", "graph_memory", "live_envelope", "measured_sizes"]

Linear = tuple[int, int]
"""Bytes as ``(fixed, per_sample)``."""

_BATCHES = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 48, 64, 128)
"""Batch sizes for which the arena is replayed."""

ALIASES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})
_IN_PLACE = frozenset(
    {"Relu", "LeakyRelu", "Elu", "Celu", "Selu", "ThresholdedRelu", "Clip", "Sigmoid", "HardSigmoid", "Tanh"}
    | {"Softplus", "Softsign"}
)


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


def graph_memory(name: str, model: ModelProto, sizes: Mapping[str, Linear]) -> GraphMemory:
    """The memory plan of a graph.

    Args:
        name: Its file.
        model: The graph.
        sizes: Size of every computed value, from :func:`measured_sizes`.
    """
    shapes = value_shapes(model)
    unfolded = max((unfolded_sample(node, shapes) for node in model.graph.node), default=0)
    return GraphMemory(name, live_envelope(model, sizes), constant_bytes(model), unfolded)


def constant_bytes(model: ModelProto, *, rounded: bool = False) -> int:
    """Bytes of the tensors that a graph holds, as initialisers or as attributes of its nodes."""
    held = [item.t for node in model.graph.node for item in node.attribute if item.HasField("t")]
    sizes = [len(tensor.raw_data) or tensor.ByteSize() for tensor in (*model.graph.initializer, *held)]
    return sum(-(-size // ALIGNMENT) * ALIGNMENT if rounded else size for size in sizes)


def live_envelope(model: ModelProto, sizes: Mapping[str, Linear]) -> tuple[Linear, ...]:
    """What the arena needs for a graph, for all batch sizes.

    With the workspace of kernels on one thread. Constants count as fixed: the arena reserves them. Inputs do not, nor
    do the parts into which ``w`` and ``index`` are split.

    Args:
        model: The graph.
        sizes: Size of every computed value, from :func:`measured_sizes`.

    Returns:
        Pairs ``(fixed_bytes, bytes_per_sample)``; at batch ``B`` the largest ``fixed + per_sample * B`` holds. It is
        the largest live set, and what the arena needs over it at any of :data:`_BATCHES`.
    """
    constants = constant_bytes(model, rounded=True)
    requests, parts = _requests_of(model, sizes)
    bare = [request for request in requests if request[0] not in parts]
    in_parts = sum(-(-size[0] // ALIGNMENT) * ALIGNMENT for name, size in requests if size and name in parts)
    live = envelope_of((constants + fixed, per_sample) for fixed, per_sample in _live_sets(bare))
    # Parts that are given back leave room for tensors, where there are many: not in a sparse network.
    needed = {b: constants + max(arena_bytes(bare, b), arena_bytes(requests, b) - in_parts) for b in _BATCHES}
    return _raised(live, needed)


def _live_sets(requests: Iterable[Request]) -> Iterator[Linear]:
    held: dict[Hashable, Linear] = {}
    yield 0, 0
    for name, size in requests:
        if size is None:
            held.pop(name, None)
        else:
            held[name] = _rounded(size)
            yield sum(f for f, _ in held.values()), sum(p for _, p in held.values())


def _raised(lines: tuple[Linear, ...], needed: Mapping[int, int]) -> tuple[Linear, ...]:
    """The lines, all raised by the one line that makes up best for what they lack at some batch sizes."""
    lacking = {b: max(0, n - max(f + p * b for f, p in lines)) for b, n in needed.items()}
    points = sorted(lacking.items())
    chords = [(0, max(-(-d // b) for b, d in points)), (max(lacking.values()), 0)]
    for (b0, d0), (b1, d1) in itertools.combinations(points, 2):
        slope = max(0, -((d0 - d1) // (b1 - b0)))
        chords.append((max(0, *(d - slope * b for b, d in points)), slope))

    def excess(line: Linear) -> float:
        return sum((line[0] + line[1] * b - lacking[b]) / max(1, n) for b, n in needed.items())

    fixed, per_sample = min(chords, key=excess)
    return tuple((f + fixed, p + per_sample) for f, p in lines)


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
    requests: list[Request] = field(default_factory=list)
    parts: set[Hashable] = field(default_factory=set)
    of: dict[str, str] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    live: dict[str, None] = field(default_factory=dict)
    last_use: dict[str, int] = field(default_factory=dict)

    def foreign(self, name: str) -> None:
        """A value whose memory is counted elsewhere."""
        self.of[name] = name
        self.names[name] = [name]

    def new(self, name: str, size: Linear) -> None:
        self.foreign(name)
        self.requests.append((name, size))
        self.live[name] = None

    def share(self, name: str, source: str) -> None:
        self.of[name] = self.of[source]
        self.names[self.of[source]].append(name)

    def reusable(self, source: str, position: int) -> bool:
        """Whether the node at ``position`` is the last to need the buffer of ``source``."""
        owner = self.of[source]
        return owner in self.live and owner not in self.parts and self._done(owner, position)

    def free(self, position: int) -> None:
        for owner in [owner for owner in self.live if self._done(owner, position)]:
            del self.live[owner]
            self.requests.append((owner, None))

    def _done(self, owner: str, position: int) -> bool:
        return all(self.last_use.get(n, -1) <= position and n not in self.outputs for n in self.names[owner])


def _requests_of(model: ModelProto, sizes: Mapping[str, Linear]) -> tuple[list[Request], set[Hashable]]:
    """What a run asks of the arena, and which of that are parts of ``w`` and ``index``."""
    graph = model.graph
    buffers = _Buffers({value.name for value in graph.output})
    for name in (*input_names(graph), *(tensor.name for tensor in graph.initializer)):
        buffers.foreign(name)
    for position, node in enumerate(graph.node):
        for name in node.input:
            buffers.last_use[name] = position
    shapes = value_shapes(model)
    for position, node in enumerate(graph.node):
        workspace = workspace_of(node, shapes, sizes)
        own = [((position, number), size) for number, size in enumerate(workspace.pieces)]
        if workspace.before_outputs:
            buffers.requests += own
        _allocate(node, position, buffers, sizes)
        if not workspace.before_outputs:
            buffers.requests += own
        buffers.requests += [(name, None) for name, _ in own]
        buffers.free(position)
    return buffers.requests, buffers.parts


def _allocate(node: NodeProto, position: int, buffers: _Buffers, sizes: Mapping[str, Linear]) -> None:
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
        if node.op_type == "Split" and node.input[0] in ("w", "index"):
            buffers.parts.add(name)


def _rounded(size: Linear) -> Linear:
    """An upper bound of the size rounded up to the alignment, for every batch."""
    fixed, per_sample = size
    if per_sample % ALIGNMENT:
        return fixed + ALIGNMENT - 1, per_sample
    return -(-fixed // ALIGNMENT) * ALIGNMENT, per_sample
