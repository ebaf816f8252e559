"""A second probe graph for x86: its inputs are the blocked weight tensors that ONNX Runtime makes for its kernels.

ONNX Runtime rewrites convolutions to its blocked kernels, and fuses operators, only where weights are constants. So
the weights become constants for a moment, each entry with a value of its own; ONNX Runtime optimises the graph and
saves it; two detours out of the blocked layout are cut (:mod:`.blocked_rewrites`); the values in the tensors tell where
every entry went. The tensors then become inputs, and the engine writes each survivor straight into its place. The
losses are those of the same graph with constant weights, bit for bit (without prepacking, which only constants get and
which cuts long sums in other places).

The saved graph holds private operators: it is good for one release of ONNX Runtime and one block size, and only
machines of that kind load it (:class:`~fedzo.protocol.artifact.manifest.GraphVariant`).
"""

from __future__ import annotations

import logging
import os
import platform
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..protocol.artifact.layout import Layout, Parameter
from ..protocol.artifact.placement import BlockedAxis, Placement
from ..protocol.errors import FedzoError
from .blocked_rewrites import BLOCKED_DOMAIN, stay_blocked
from .passes.editing import new_node, replace_nodes
from .passes.fold_weights import FoldWeights

__all__ = ["BLOCKED_DOMAIN", "BLOCK_SIZES", "BlockedProbe", "UntraceableError", "block_probe", "optimised_by_runtime"]

BLOCK_SIZES: Final = (8, 16)
_MACHINES: Final = {"x86_64": "x86_64", "AMD64": "x86_64"}
_FIRST: Final = 1 << 23
"""Entry ``k`` has the value ``2**23 + k``: float32 holds all integers below ``2**24``, and no graph has such constants
for another reason."""

logger = logging.getLogger(__name__)


class UntraceableError(FedzoError):
    """The optimised graph holds the weights in another way than one whole parameter a tensor."""


@dataclass(frozen=True)
class BlockedProbe:
    """A probe graph for one kind of machine.

    Attributes:
        model: Takes one ``float32`` tensor a parameter of the layout, of its name and its new shape, ``x`` and ``y``.
        placements: Of the parameters whose entries moved, by name; the others are in C order.
        machine: Processor family, ``x86_64``, or ``any``.
        onnxruntime: The release that made it, or ``any``.
        block: Channels in a block, 8 or 16; 0 without blocks.
    """

    model: ModelProto
    placements: dict[str, Placement]
    machine: str
    onnxruntime: str
    block: int

    def zero_weights(self) -> dict[str, NDArray[np.generic]]:
        """Zeros for every weight input, by name."""
        types = {value.name: value.type.tensor_type for value in self.model.graph.input}
        return {
            name: np.zeros([axis.dim_value for axis in kind.shape.dim], np.float32)
            for name, kind in types.items()
            if name not in ("x", "y")
        }

    @property
    def weight_bytes(self) -> int:
        """Size of all weight inputs."""
        return sum(value.nbytes for value in self.zero_weights().values())


def block_probe(probe: ModelProto, layout: Layout) -> BlockedProbe | None:
    """Make the graph for machines like this one.

    Args:
        probe: The portable ``probe.onnx``, or a graph with one input a parameter.
        layout: Its parameters.

    Returns:
        None where it would not be faster, or cannot be made: on other processors, without convolutions, or if ONNX
        Runtime computes new constants from the weights. The log says which.
    """
    machine = _MACHINES.get(platform.machine())
    if machine is None or layout.size > _FIRST:
        logger.info("no blocked graph: machine %s, %d weights", platform.machine(), layout.size)
        return None
    try:
        twin = FoldWeights(layout, np.arange(_FIRST, _FIRST + layout.size).astype(np.float32))(probe).model
        optimised, version = optimised_by_runtime(twin)
        if all(node.domain != BLOCKED_DOMAIN for node in optimised.graph.node):
            logger.info("no blocked graph: onnxruntime %s uses no blocked kernel for this model", version)
            return None
        block = _block_size()
        stay_blocked(optimised, block)
        traced = _trace(optimised, layout)
        placements = {
            parameter.name: placement
            for parameter, tensor in traced
            if (placement := _placement(parameter, tensor)) is not None
        }
        rewritten = _with_inputs(optimised, probe, traced)
        return BlockedProbe(rewritten, placements, machine, version, block)
    except UntraceableError as error:
        logger.info("no blocked graph: %s", error.message)
        return None


def optimised_by_runtime(model: ModelProto) -> tuple[ModelProto, str]:
    """``model`` after every rewriting of ONNX Runtime for this machine, and the release that did it."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read once, when the library is loaded
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    version = str(onnxruntime.__version__)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(path)
        try:
            onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise UntraceableError(f"onnxruntime {version} cannot optimise the graph: {error}") from error
        return onnx.load(str(path)), version


def _block_size() -> int:
    """Channels in a block on this machine: what one filter is padded to."""
    weight = numpy_helper.from_array(np.ones((1, 1, 3, 3), np.float32), "weight")
    image = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 1, None, None]) for n in ("x", "y")]
    graph = helper.make_graph([new_node("Conv", ["x", "weight"], ["y"])], "one_filter", image[:1], image[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (padded,) = optimised_by_runtime(model)[0].graph.initializer
    if padded.dims[0] not in BLOCK_SIZES:
        raise UntraceableError(f"one filter is padded to {padded.dims[0]}")
    return int(padded.dims[0])


def _trace(model: ModelProto, layout: Layout) -> list[tuple[Parameter, TensorProto]]:
    """The tensor that holds each parameter, in layout order.

    Raises:
        UntraceableError: An entry is absent or there twice, or a tensor mixes parameters.
    """
    found: dict[str, TensorProto] = {}
    starts = np.array(layout.offsets)
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        entries = _entries(tensor)
        weights = entries[entries >= 0]
        if not weights.size:
            continue
        position = int(np.searchsorted(starts, weights[0], side="right")) - 1
        parameter, place = layout.parameters[position], layout.slice_of(position)
        if parameter.name in found or not np.array_equal(np.sort(weights), np.arange(place.start, place.stop)):
            raise UntraceableError(f"{tensor.name} does not hold the entries of {parameter.name} once each")
        found[parameter.name] = tensor
    absent = [p.name for p in layout.parameters if p.name not in found]
    if absent:
        raise UntraceableError(f"{absent[0]} is in no tensor of the optimised graph")
    return [(p, found[p.name]) for p in layout.parameters]


def _entries(tensor: TensorProto) -> NDArray[np.int64]:
    """Flat index in the layout of every entry, -1 for zeros; -1 everywhere if it holds no weights."""
    values = numpy_helper.to_array(tensor).ravel()
    weights = (values >= _FIRST) & (values < 2 * _FIRST)
    if not weights.any():
        return np.full(values.size, -1)
    if np.any(values[~weights]):
        raise UntraceableError(f"{tensor.name} holds weights and other numbers")
    return np.where(weights, values.astype(np.int64) - _FIRST, -1)


def _placement(parameter: Parameter, tensor: TensorProto) -> Placement | None:
    """The rule that puts ``parameter`` into ``tensor``; None if its entries stay in C order without padding.

    Raises:
        UntraceableError: There is no such rule.
    """
    entries = _entries(tensor)
    kept = np.flatnonzero(entries >= 0)
    if kept.size == entries.size and np.all(np.diff(entries) == 1):
        return None
    positions = kept[np.argsort(entries[kept])].reshape(parameter.shape)
    axes = []
    for axis, extent in enumerate(parameter.shape):
        line = positions[tuple(slice(None) if k == axis else 0 for k in range(positions.ndim))]
        axes.append(_axis(line, extent))
    placement = Placement(entries.size, tuple(a for a in axes if a is not None))
    index = np.arange(parameter.size, dtype=np.int32)
    if None in axes or not np.array_equal(placement.positions(parameter.shape, index), positions.ravel()):
        raise UntraceableError(f"{parameter.name} is rearranged in an unknown way")
    return placement


def _axis(line: NDArray[np.int64], extent: int) -> BlockedAxis | None:
    coordinate = np.arange(extent)
    for block in (extent, *BLOCK_SIZES):
        inner = int(line[1]) if min(block, extent) > 1 else 0
        outer = int(line[block]) if block < extent else 0
        if np.array_equal(line, coordinate // block * outer + coordinate % block * inner):
            return BlockedAxis(block, outer, inner)
    return None


def _with_inputs(optimised: ModelProto, probe: ModelProto, traced: list[tuple[Parameter, TensorProto]]) -> ModelProto:
    """Turn the traced tensors into inputs that bear the names of their parameters.

    ONNX Runtime numbers new values, and writes constants and attributes, in the order of hash tables: they are
    brought into an order of their own, so that two exports give the same bytes.
    """
    model = ModelProto()
    model.CopyFrom(optimised)
    graph = model.graph
    names = {tensor.name: parameter.name for parameter, tensor in traced}
    constants = sorted((t for t in graph.initializer if t.name not in names), key=lambda t: t.name)
    samples = [value for value in probe.graph.input if value.name in ("x", "y")]
    del graph.initializer[:], graph.input[:], graph.value_info[:]
    graph.initializer.extend(constants)
    graph.input.extend(
        helper.make_tensor_value_info(parameter.name, TensorProto.FLOAT, tensor.dims) for parameter, tensor in traced
    )
    graph.input.extend(samples)
    graph.name = probe.graph.name
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = names.get(name, name)
    replace_nodes(graph, _in_order(graph))
    _rename(graph, {name for node in probe.graph.node for name in node.output})
    used = {node.domain for node in graph.node}
    imports = sorted((entry for entry in model.opset_import if entry.domain in used), key=lambda e: e.domain)
    del model.opset_import[:]
    model.opset_import.extend(imports)
    return model


def _in_order(graph: GraphProto) -> list[NodeProto]:
    """The nodes in an order that only the graph decides: each just before the first node that needs it."""
    producers = {name: node for node in graph.node for name in node.output}
    done: dict[str, NodeProto] = {}
    stack = [value.name for value in reversed(graph.output)]
    while stack:
        node = producers.get(stack[-1])
        if node is None or node.output[0] in done:
            stack.pop()
            continue
        waiting = [name for name in node.input if name in producers and producers[name].output[0] not in done]
        if waiting:
            stack += reversed(waiting)
        else:
            done[node.output[0]] = node
    return list(done.values())


def _rename(graph: GraphProto, known: Collection[str]) -> None:
    """Number the values that ``known`` lacks, name nodes after their outputs, and sort attributes."""
    fresh = [name for node in graph.node for name in node.output if name and name not in known]
    names = {name: f"fedzo.blocked.{k}" for k, name in enumerate(fresh)}
    for node in graph.node:
        for values in (node.input, node.output):
            for position, name in enumerate(values):
                values[position] = names.get(name, name)
        node.name = node.output[0]
        attributes = sorted(node.attribute, key=lambda a: a.name)
        del node.attribute[:]
        node.attribute.extend(attributes)
