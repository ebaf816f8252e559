"""The graph of a stage's gradient gives what automatic differentiation gives, for every operator of a chain."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor
from torch.nn import functional

from fedzo.exporter.graphs import _weight_passes
from fedzo.exporter.passes.infrastructure import PassError, Sequential
from fedzo.exporter.passes.keep_stage import KeepStage
from fedzo.exporter.passes.stage_gradient import StageGradient
from fedzo.exporter.sessions import run_graph
from fedzo.exporter.stages import StagePoint, find_stages
from fedzo.exporter.units import find_units
from fedzo.protocol.artifact.layout import Layout
from fedzo.protocol.pruning.mask import Mask, threshold
from tests.exporter.text_graphs import LINEAR, layout_of, numbers, operators, parse, signature

BATCH = 5
Forward = Callable[[Tensor, list[Tensor]], Tensor]


def stage_graphs(text: str, number: int = 0) -> tuple[StagePoint, Layout, ModelProto, ModelProto]:
    """The stage, its parameters, its forward graph and the graph of its gradient."""
    model = parse(text)
    layout = layout_of(model)
    point = find_stages(model, layout, find_units(model, layout))[number]
    stage, own = point.stage, point.stage.layout(layout)
    keep = KeepStage(point.value, stage.feature_shape, point.output, stage.output_shape)
    forward = Sequential([keep, *_weight_passes(own)])(model).model
    gradient = Sequential([keep, StageGradient(own, stage.output_shape), *_weight_passes(own)])(model).model
    return point, own, forward, gradient


def check(text: str, forward: Forward, *, number: int = 0, sparsity: float = 0.0, tolerance: float = 2e-5) -> None:
    """Compare output and gradient with torch, on the entries that a mask keeps and on those that it removes."""
    point, layout, ahead, back = stage_graphs(text, number)
    dense = numbers(layout.size)
    mask = threshold(layout, np.abs(dense), sparsity) if sparsity else Mask.dense(layout)
    dense = np.where(mask.kept, dense, np.float32(0))
    features = numbers(BATCH, *point.stage.feature_shape, seed=1)
    cotangent = numbers(BATCH, *point.stage.output_shape, seed=2)
    feeds: dict[str, NDArray[np.generic]] = {"w": dense[mask.survivors()], "index": mask.index()}
    feeds |= {"counts": mask.counts(), "features": features, "cotangent": cotangent}
    tensors = [
        torch.tensor(dense[layout.slice_of(k)].reshape(p.shape), requires_grad=True)
        for k, p in enumerate(layout.parameters)
    ]
    output = forward(torch.from_numpy(features), tensors)
    found = run_graph(ahead, feeds)["next_features"]
    np.testing.assert_allclose(found, output.detach().numpy(), atol=1e-5)
    (output * torch.from_numpy(cotangent)).sum().backward()  # type: ignore[no-untyped-call]
    exact = np.concatenate([t.grad.numpy().ravel() for t in tensors if t.grad is not None])
    gradient = run_graph(back, feeds)["gradient"]
    assert gradient.shape == (layout.size,)
    np.testing.assert_allclose(gradient, exact, atol=tolerance * max(1.0, float(np.abs(exact).max())))


def network(layers: str, parameters: str, x: str, n_outputs: int) -> str:
    """A network of one stage in front of a last layer; the stage ends with ``flat``."""
    return f"""
    net (float[batch, {x}] x, {parameters}, float[3, {n_outputs}] last) => (float[batch, 3] logits) {{
        {layers}
        flat = Flatten (h)
        logits = Gemm <transB = 1> (flat, last)
    }}
    """


ACTIVATIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "relu": ("Relu", torch.relu),
    "tanh": ("Tanh", torch.tanh),
    "sigmoid": ("Sigmoid", torch.sigmoid),
    "leaky": ("LeakyRelu <alpha = 0.2>", lambda h: functional.leaky_relu(h, 0.2)),
    "negative": ("LeakyRelu <alpha = -0.5>", lambda h: functional.leaky_relu(h, -0.5)),
    "identity": ("Identity", lambda h: h),
}
POOLS: dict[str, tuple[str, Callable[[Tensor], Tensor], int]] = {
    "none": ("Identity", lambda h: h, 4 * 7 * 5),
    "average": ("AveragePool <kernel_shape = [2, 2], strides = [2, 2]>", lambda h: functional.avg_pool2d(h, 2), 24),
    "overlap": ("AveragePool <kernel_shape = [3, 2]>", lambda h: functional.avg_pool2d(h, (3, 2), 1), 80),
    "padded": (
        "AveragePool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>",
        lambda h: functional.avg_pool2d(h, 3, 2, 1, count_include_pad=False),
        48,
    ),
    "padding counted": (
        "AveragePool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1], count_include_pad = 1>",
        lambda h: functional.avg_pool2d(h, 3, 2, 1),
        48,
    ),
    "rounded up": (
        "AveragePool <kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1>",
        lambda h: functional.avg_pool2d(h, 2, ceil_mode=True),
        48,
    ),
    "maximum": ("MaxPool <kernel_shape = [2, 2], strides = [2, 2]>", lambda h: functional.max_pool2d(h, 2), 24),
    "maximum overlap": (
        "MaxPool <kernel_shape = [3, 3], strides = [1, 2], pads = [1, 1, 1, 1]>",
        lambda h: functional.max_pool2d(h, 3, (1, 2), 1),
        84,
    ),
    "global": ("GlobalAveragePool", lambda h: h.mean((2, 3), keepdim=True), 4),
}


@pytest.mark.parametrize("sparsity", [0.0, 0.7])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pool", POOLS)
def test_convolutions_with_activations_and_pools(activation: str, pool: str, sparsity: float) -> None:
    act, torch_act = ACTIVATIONS[activation]
    pooling, torch_pool, n_outputs = POOLS[pool]
    for first, second in ((act, pooling), (pooling, act)):
        layers = f"c = Conv <pads = [1, 0, 0, 1]> (x, w1, b1)\n a = {first} (c)\n h = {second} (a)"
        text = network(layers, "float[4, 3, 2, 3] w1, float[4] b1", "3, 7, 6", n_outputs)

        def forward(x: Tensor, p: list[Tensor], swapped: bool = first is not act) -> Tensor:
            h = functional.conv2d(functional.pad(x, (0, 1, 1, 0)), p[0], p[1])
            return (torch_act(torch_pool(h)) if swapped else torch_pool(torch_act(h))).flatten(1)

        check(text, forward, sparsity=sparsity)


@settings(max_examples=60, deadline=None)
@given(
    axes=st.integers(1, 2),
    size=st.integers(5, 9),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 2),
    bias=st.booleans(),
)
def test_every_window(axes: int, size: int, kernel: int, stride: int, dilation: int, padding: int, bias: bool) -> None:
    sizes = [size, size + 2][:axes]
    target = [(s + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for s in sizes]
    assume(min(target) > 0 and padding < (kernel - 1) * dilation + 1)
    window = f"strides = {[stride] * axes}, dilations = {[dilation] * axes}, pads = {[padding] * (2 * axes)}"
    shape = ", ".join(map(str, [4, 2, *[kernel] * axes]))
    named = f"float[{shape}] w1" + (", float[4] b1" if bias else "")
    layers = f"c = Conv <{window}> (x, w1{', b1' if bias else ''})\n h = Tanh (c)"
    convolve = functional.conv2d if axes == 2 else functional.conv1d

    def forward(x: Tensor, p: list[Tensor]) -> Tensor:
        h = convolve(x, p[0], p[1] if bias else None, stride=stride, padding=padding, dilation=dilation)
        return torch.tanh(h).flatten(1)

    check(network(layers, named, ", ".join(map(str, [2, *sizes])), 4 * math.prod(target)), forward, sparsity=0.5)


@pytest.mark.parametrize("rule", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_padding_by_rule(rule: str) -> None:
    layers = f'c = Conv <strides = [2], auto_pad = "{rule}"> (x, w1)\n h = Relu (c)'
    n = 3 if rule == "VALID" else 4
    pads = {"SAME_UPPER": (0, 1), "SAME_LOWER": (1, 0), "VALID": (0, 0)}[rule]

    def forward(x: Tensor, p: list[Tensor]) -> Tensor:
        return torch.relu(functional.conv1d(functional.pad(x, pads), p[0], stride=2)).flatten(1)

    check(network(layers, "float[4, 2, 2] w1", "2, 7", 4 * n), forward)


POOLS_1D: dict[str, Callable[[Tensor], Tensor]] = {
    "AveragePool <kernel_shape = [2], strides = [2]>": lambda h: functional.avg_pool1d(h, 2),
    "MaxPool <kernel_shape = [3], strides = [2], pads = [1, 1]>": lambda h: functional.max_pool1d(h, 3, 2, 1),
    "GlobalAveragePool": lambda h: h.mean(2, keepdim=True),
}


@pytest.mark.parametrize("pool", POOLS_1D)
def test_one_axis(pool: str) -> None:
    layers = f"c = Conv (x, w1, b1)\n a = Relu (c)\n h = {pool} (a)"

    def forward(x: Tensor, p: list[Tensor]) -> Tensor:
        return POOLS_1D[pool](torch.relu(functional.conv1d(x, p[0], p[1]))).flatten(1)

    n = {"A": 3, "M": 4, "G": 1}[pool[0]]
    check(network(layers, "float[4, 2, 3] w1, float[4] b1", "2, 9", 4 * n), forward, sparsity=0.5)


DENSE = {
    "Gemm": "c = Gemm <transB = 1> (x, w1, b1)\n h = {act} (c)",
    "transposed": "t = Transpose <perm = [1, 0]> (w1)\n c = Gemm (x, t, b1)\n h = {act} (c)",
    "MatMul": "t = Transpose <perm = [1, 0]> (w1)\n m = MatMul (x, t)\n c = Add (m, b1)\n h = {act} (c)",
    "Add first": "t = Transpose <perm = [1, 0]> (w1)\n m = MatMul (x, t)\n c = Add (b1, m)\n h = {act} (c)",
}


@pytest.mark.parametrize("form", DENSE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fully_connected_layers(form: str, activation: str) -> None:
    act, torch_act = ACTIVATIONS[activation]
    text = network(DENSE[form].format(act=act), "float[6, 4] w1, float[6] b1", "4", 6)
    check(text, lambda x, p: torch_act(functional.linear(x, p[0], p[1])), sparsity=0.5)


def test_the_last_stage_and_reshapes_in_front_of_the_first() -> None:
    text = """
    net (float[batch, 2, 3] x, float[5, 6] w1, float[3, 5] w2, float[3] b2) => (float[batch, 3] logits) {
        flat = Flatten (x)
        a = Gemm <transB = 1> (flat, w1)
        h = Relu (a)
        logits = Gemm <transB = 1> (h, w2, b2)
    }
    """
    check(text, lambda x, p: torch.relu(functional.linear(x.flatten(1), p[0])))
    check(text, lambda x, p: functional.linear(x, p[0], p[1]), number=1)


def test_only_operators_of_inference_and_the_stages_own_weights() -> None:
    layers = "c = Conv (x, w1, b1)\n a = Relu (c)\n h = MaxPool <kernel_shape = [2, 2]> (a)"
    text = network(layers, "float[4, 3, 2, 3] w1, float[4] b1", "3, 7, 6", 60)
    _, _, _, gradient = stage_graphs(text)
    assert signature(gradient) == {
        "w": ["survivors"], "index": ["survivors"], "counts": [2], "features": ["batch", 3, 7, 6],
        "cotangent": ["batch", 60], "gradient": [76],
    }  # fmt: skip
    assert {node.domain for node in gradient.graph.node} == {""}
    assert "MaxUnpool" not in operators(gradient)


def test_other_graphs_are_refused() -> None:
    model = parse(LINEAR)
    with pytest.raises(PassError, match="no input features"):
        StageGradient(layout_of(model), (4,))(model)
    with pytest.raises(PassError, match="does not compute 'nothing'"):
        KeepStage("x", (3,), "nothing", (4,))(model)
