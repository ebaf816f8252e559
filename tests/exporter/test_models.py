"""The built-in models: sizes, order of parameters, and equality with a second description in torch."""

from __future__ import annotations

import numpy as np
import pytest

from fedzo.exporter.models.registry import MODELS, build_forward
from fedzo.exporter.reference import forward
from fedzo.exporter.sessions import run_graph
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import golden_batch
from fedzo.protocol.errors import ConfigError
from tests.exporter.text_graphs import dense_by_name, numbers

SMALLEST = {"lenet5": (1, 16, 17), "cnn1d": (3, 26), **{name: (1, 8, 9) for name in MODELS if name.startswith("res")}}


@pytest.mark.parametrize(
    ("model", "shape", "classes", "size"),
    [
        ("lenet5", (1, 32, 32), 10, 61_706),
        ("lenet5", (3, 32, 32), 10, 62_006),
        ("lenet5", (1, 28, 28), 10, 44_426),
        ("lenet5", (1, 16, 16), 4, 15_116),
        ("resnet8", (3, 32, 32), 10, 78_042),
        ("resnet20", (3, 32, 32), 10, 272_474),
        ("resnet32", (3, 32, 32), 10, 466_906),
        ("resnet56", (3, 32, 32), 10, 855_770),
        ("cnn1d", (9, 128), 6, 13_798),
    ],
)
def test_sizes(model: str, shape: tuple[int, ...], classes: int, size: int) -> None:
    assert build_forward(model, shape, classes, 0).layout.size == size


@pytest.mark.parametrize("model", list(MODELS))
def test_parameters_are_in_the_order_of_their_first_use(model: str) -> None:
    forward_graph = build_forward(model, SMALLEST[model], 5, 0)
    names = [p.name for p in forward_graph.layout.parameters]
    uses = dict.fromkeys(name for node in forward_graph.model.graph.node for name in node.input)
    assert [name for name in uses if name in names] == names
    assert [v.name for v in forward_graph.model.graph.input] == ["x", *names]
    for parameter in forward_graph.layout.parameters:
        expected = ("normal", 0.0) if parameter.maskable else ("constant", float(parameter.name.endswith("weight")))
        kind, scale = parameter.initialiser.kind, parameter.initialiser.scale
        if parameter.maskable:
            fan_in = int(np.prod(parameter.shape[1:]))
            expected = ("normal", float(np.float32(np.sqrt(2.0 / fan_in))))
        assert (kind, scale) == expected, parameter.name


@pytest.mark.parametrize(
    ("model", "shape"),
    [*SMALLEST.items(), ("lenet5", (3, 33, 30)), ("resnet20", (3, 32, 32)), ("cnn1d", (9, 128))],
)
def test_logits_are_those_of_the_torch_description(model: str, shape: tuple[int, ...]) -> None:
    graph = build_forward(model, shape, 5, 0)
    weights = initial_weights(graph.layout, 3)
    # Biases and normalisation start at 0 and 1, where a mistake in their use would not show.
    maskable = np.concatenate([np.full(p.size, p.maskable) for p in graph.layout.parameters])
    weights[~maskable] += np.float32(0.3) * numbers(int((~maskable).sum()))
    x, _ = golden_batch(shape, 5, 1, 3)
    logits = run_graph(graph.model, {**dense_by_name(graph.layout, weights), "x": x})["logits"]
    expected = forward(model, graph.layout, weights, x)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("model", "shape", "classes", "message"),
    [
        ("lenet5", (1, 15, 32), 10, "lenet5 takes inputs CxHxW with H and W of at least 16, not 1x15x32"),
        ("lenet5", (9, 128), 10, "not 9x128"),
        ("resnet20", (3, 7, 8), 10, "resnet20 takes inputs CxHxW with H and W of at least 8, not 3x7x8"),
        ("cnn1d", (9, 25), 10, "cnn1d takes inputs CxL with L of at least 26, not 9x25"),
        ("cnn1d", (1, 32, 32), 10, "not 1x32x32"),
        ("lenet5", (), 10, r"the input shape \(empty\) has an axis below 1"),
        ("lenet5", (1, 0, 32), 10, "the input shape 1x0x32 has an axis below 1"),
        ("lenet5", (1, 1 << 14, 1 << 14), 10, "one sample has 268435456 values, the limit is 67108864"),
        ("lenet5", (1, 32, 32), 1, "the number of classes is 1, it must be 2 to 1048576"),
        ("lenet5", (1, 32, 32), 1 << 21, "the number of classes is 2097152"),
        ("lenet-5", (1, 32, 32), 10, "there is no model 'lenet-5'; there are lenet5, resnet8"),
    ],
)
def test_what_does_not_fit_is_refused(model: str, shape: tuple[int, ...], classes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_forward(model, shape, classes, 0)


@pytest.mark.parametrize(
    ("model", "hint"), [("lenet", "did you mean 'lenet5'?"), ("resnet18", "did you mean 'resnet"), ("x", "module:fun")]
)
def test_unknown_models_get_a_hint(model: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_forward(model, (1, 32, 32), 10, 0)
    assert hint in caught.value.hint
