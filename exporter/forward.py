"""A forward graph: input ``x`` to ``logits``, every trainable tensor a named graph input.

Reference models and imported torch models meet here; the passes turn a forward graph into the graphs of an artifact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from ..protocol.artifact.layout import Initialiser, Layout, Parameter
from ..protocol.errors import ConfigError

__all__ = ["BATCH", "IR_VERSION", "OPSET", "RESERVED_NAMES", "ForwardGraph", "GraphBuilder", "Tensor", "he_normal"]

OPSET = 17
IR_VERSION = 8
BATCH = "batch"
"""Name of the symbolic batch axis."""

RESERVED_NAMES = frozenset(
    {
        "w",
        "index",
        "counts",
        "x",
        "y",
        "shift",
        "features",
        "noise",
        "inputs",
        "logits",
        "loss_sum",
        "losses",
        "moments",
        "next_features",
        "cotangent",
        "gradient",
        "head",
        "head_gradient",
        "pooled",
    }
)
"""Inputs and outputs of the finished graphs; no parameter may be called so."""


@dataclass(frozen=True)
class ForwardGraph:
    """A model as a graph and a layout.

    Attributes:
        model: Opset 17; inputs ``x float32[batch, *input_shape]`` and one input per parameter under its layout name;
            output ``logits float32[batch, n_classes]``.
        layout: Parameters in the order in which the graph first uses them.
    """

    model: ModelProto
    layout: Layout


@dataclass(frozen=True, slots=True)
class Tensor:
    """A value of a graph under construction.

    Attributes:
        name: Its name.
        shape: Its shape without the batch axis, for example ``(channels, height, width)``.
    """

    name: str
    shape: tuple[int, ...]


def he_normal(fan_in: int) -> Initialiser:
    """Normal with standard deviation ``sqrt(2 / fan_in)``, rounded to float32 (He et al., ICCV 2015, equation 10)."""
    return Initialiser("normal", float(np.float32(math.sqrt(2.0 / fan_in))))


class GraphBuilder:
    """Builds a forward graph layer by layer; nodes lie in the order in which they are added.

    Args:
        name: Name of the graph.
        input_shape: Shape of one sample, without the batch axis.
    """

    def __init__(self, name: str, input_shape: Sequence[int]) -> None:
        self._name = name
        self._nodes: list[NodeProto] = []
        self._constants: dict[str, TensorProto] = {}
        self._parameters: list[Parameter] = []
        self.x = Tensor("x", tuple(input_shape))

    def parameter(self, name: str, shape: Sequence[int], maskable: bool, initialiser: Initialiser) -> str:
        """Add a trainable tensor; returns its name."""
        self._parameters.append(Parameter(name, tuple(shape), maskable, initialiser))
        return name

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        """Add a constant (once per name); returns its name."""
        self._constants.setdefault(name, numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Append a node with one output; returns the output's name."""
        self._nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def convolution(
        self, name: str, x: Tensor, channels: int, kernel: int, *, stride: int = 1, padding: int = 0, bias: bool = True
    ) -> Tensor:
        """Convolution over all axes after the first, with a square kernel and He-normal weights."""
        in_channels, spatial = x.shape[0], x.shape[1:]
        out_spatial = tuple((n + 2 * padding - kernel) // stride + 1 for n in spatial)
        if min(out_spatial) < 1:
            raise ConfigError(f"layer {name!r} has no output for an input of shape {x.shape}")
        kernels = (kernel,) * len(spatial)
        fan_in = in_channels * math.prod(kernels)
        inputs = [
            x.name,
            self.parameter(f"{name}.weight", (channels, in_channels, *kernels), True, he_normal(fan_in)),
        ]
        if bias:
            inputs.append(self.parameter(f"{name}.bias", (channels,), False, Initialiser("constant", 0.0)))
        self.node(
            "Conv",
            inputs,
            name,
            kernel_shape=kernels,
            strides=(stride,) * len(spatial),
            pads=(padding,) * (2 * len(spatial)),
            dilations=(1,) * len(spatial),
            group=1,
        )
        return Tensor(name, (channels, *out_spatial))

    def linear(self, name: str, x: Tensor, units: int, *, output: str | None = None) -> Tensor:
        """Fully connected layer with bias and He-normal weights on a flat ``x``; ``output`` names its result."""
        (inputs,) = x.shape
        weight = self.parameter(f"{name}.weight", (units, inputs), True, he_normal(inputs))
        bias = self.parameter(f"{name}.bias", (units,), False, Initialiser("constant", 0.0))
        return Tensor(self.node("Gemm", [x.name, weight, bias], output or name, transB=1), (units,))

    def group_normalisation(self, name: str, x: Tensor, groups: int, *, epsilon: float = 1e-5) -> Tensor:
        """Group normalisation with a learned scale and offset per channel.

        Written with InstanceNormalization, which opset 17 has and which is the fastest form on onnxruntime's CPU
        kernels. Wu and He, "Group normalization", ECCV 2018.
        """
        channels, spatial = x.shape[0], x.shape[1:]
        grouped = self.constant(f"fedzo.groups{groups}", np.array([0, groups, -1], np.int64))
        shape = self.constant("fedzo.shape." + "x".join(map(str, x.shape)), np.array([0, *x.shape], np.int64))
        affine = self.constant(
            f"fedzo.affine{channels}x{len(spatial)}", np.array([channels, *(1 for _ in spatial)], np.int64)
        )
        ones = self.constant(f"fedzo.ones{groups}", np.ones(groups, np.float32))
        zeros = self.constant(f"fedzo.zeros{groups}", np.zeros(groups, np.float32))
        gamma = self.parameter(f"{name}.weight", (channels,), False, Initialiser("constant", 1.0))
        beta = self.parameter(f"{name}.bias", (channels,), False, Initialiser("constant", 0.0))
        flat = self.node("Reshape", [x.name, grouped], f"{name}.grouped")
        normal = self.node("InstanceNormalization", [flat, ones, zeros], f"{name}.normalised", epsilon=epsilon)
        back = self.node("Reshape", [normal, shape], f"{name}.ungrouped")
        gain = self.node("Reshape", [gamma, affine], f"{name}.gain")
        scaled = self.node("Mul", [back, gain], f"{name}.scaled")
        offset = self.node("Reshape", [beta, affine], f"{name}.offset")
        return Tensor(self.node("Add", [scaled, offset], name), x.shape)

    def relu(self, x: Tensor) -> Tensor:
        """Rectified linear unit."""
        return Tensor(self.node("Relu", [x.name], f"{x.name}.relu"), x.shape)

    def add(self, a: Tensor, b: Tensor, name: str) -> Tensor:
        """Sum of two values of one shape."""
        return Tensor(self.node("Add", [a.name, b.name], name), a.shape)

    def average_pool(self, x: Tensor, kernel: int = 2) -> Tensor:
        """Average over disjoint windows; a remainder at the edge is dropped."""
        spatial = tuple(n // kernel for n in x.shape[1:])
        if min(spatial) < 1:
            raise ConfigError(f"average pooling by {kernel} has no output for an input of shape {x.shape}")
        window = (kernel,) * len(spatial)
        name = self.node("AveragePool", [x.name], f"{x.name}.pool", kernel_shape=window, strides=window)
        return Tensor(name, (x.shape[0], *spatial))

    def global_average_pool(self, x: Tensor) -> Tensor:
        """Mean over all axes after the channels; the result is flat."""
        pooled = self.node("GlobalAveragePool", [x.name], f"{x.name}.pool")
        return Tensor(self.node("Flatten", [pooled], f"{x.name}.flat", axis=1), (x.shape[0],))

    def flatten(self, x: Tensor) -> Tensor:
        """All axes but the batch as one."""
        return Tensor(self.node("Flatten", [x.name], f"{x.name}.flat", axis=1), (math.prod(x.shape),))

    def finish(self, logits: Tensor) -> ForwardGraph:
        """The finished forward graph; ``logits`` must be called so and be flat."""
        inputs = [float_value("x", (BATCH, *self.x.shape))]
        inputs += [float_value(p.name, p.shape) for p in self._parameters]
        graph = helper.make_graph(
            self._nodes,
            self._name,
            inputs,
            [float_value(logits.name, (BATCH, *logits.shape))],
            list(self._constants.values()),
        )
        return ForwardGraph(new_model(graph), Layout(tuple(self._parameters)))


def float_value(name: str, shape: Sequence[int | str]) -> ValueInfoProto:
    """Type of a float32 value of a graph; a text in ``shape`` is a symbolic axis."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def new_model(graph: GraphProto) -> ModelProto:
    """A model of the opset and IR version that every supported onnxruntime reads (1.17 and later)."""
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="fedzo"
    )
