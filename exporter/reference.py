"""The exact saliency by automatic differentiation: the yardstick of the forward-only estimate.

The networks are written down a second time, in torch and from parameter names alone, so that the reference shares no
code with the exported graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ..protocol.artifact.layout import Layout
from ..protocol.errors import ConfigError
from .models.resnet import GROUPS

__all__ = ["exact_kernel_scores", "exact_scores", "forward", "network"]

Parameters = Mapping[str, Tensor]


def _lenet5(p: Parameters, x: Tensor) -> Tensor:
    h = functional.avg_pool2d(torch.relu(functional.conv2d(x, p["conv1.weight"], p["conv1.bias"])), 2)
    h = functional.avg_pool2d(torch.relu(functional.conv2d(h, p["conv2.weight"], p["conv2.bias"])), 2)
    h = torch.relu(functional.linear(h.flatten(1), p["fc1.weight"], p["fc1.bias"]))
    h = torch.relu(functional.linear(h, p["fc2.weight"], p["fc2.bias"]))
    return functional.linear(h, p["fc3.weight"], p["fc3.bias"])


def _resnet(p: Parameters, x: Tensor) -> Tensor:
    def normal(h: Tensor, name: str) -> Tensor:
        return functional.group_norm(h, GROUPS, p[f"{name}.weight"], p[f"{name}.bias"])

    h = torch.relu(normal(functional.conv2d(x, p["conv1.weight"], padding=1), "norm1"))
    blocks = sorted({tuple(name.split(".")[:2]) for name in p if name.startswith("layer")})
    for stage, block in sorted(blocks, key=lambda item: (item[0], int(item[1]))):
        name = f"{stage}.{block}"
        stride = 2 if block == "0" and stage != "layer1" else 1
        r = functional.conv2d(h, p[f"{name}.conv1.weight"], stride=stride, padding=1)
        r = torch.relu(normal(r, f"{name}.norm1"))
        r = normal(functional.conv2d(r, p[f"{name}.conv2.weight"], padding=1), f"{name}.norm2")
        if f"{name}.shortcut.conv.weight" in p:
            h = functional.conv2d(h, p[f"{name}.shortcut.conv.weight"], stride=stride)
            h = normal(h, f"{name}.shortcut.norm")
        h = torch.relu(r + h)
    return functional.linear(h.mean((2, 3)), p["fc.weight"], p["fc.bias"])


def _cnn1d(p: Parameters, x: Tensor) -> Tensor:
    h = functional.avg_pool1d(torch.relu(functional.conv1d(x, p["conv1.weight"], p["conv1.bias"])), 2)
    h = functional.avg_pool1d(torch.relu(functional.conv1d(h, p["conv2.weight"], p["conv2.bias"])), 2)
    h = torch.relu(functional.conv1d(h, p["conv3.weight"], p["conv3.bias"]))
    return functional.linear(h.mean(2), p["fc.weight"], p["fc.bias"])


def network(model: str) -> Callable[[Parameters, Tensor], Tensor]:
    """A built-in model as a function of its parameters and a batch, to logits.

    Raises:
        ConfigError: There is no such model.
    """
    if model.startswith("resnet"):
        return _resnet
    networks = {"lenet5": _lenet5, "cnn1d": _cnn1d}
    if model not in networks:
        raise ConfigError(f"there is no torch reference of the model {model!r}")
    return networks[model]


def _split(layout: Layout, weights: NDArray[np.float32], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        p.name: torch.from_numpy(weights[layout.slice_of(k)].reshape(p.shape).copy()).to(dtype)
        for k, p in enumerate(layout.parameters)
    }


def forward(model: str, layout: Layout, weights: NDArray[np.float32], x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logits in double precision.

    Args:
        model: Name of a built-in model.
        layout: Its parameters.
        weights: ``float32[layout.size]``, dense.
        x: ``float32[batch, *input_shape]``.

    Returns:
        ``float64[batch, n_classes]``, owned by the caller.
    """
    with torch.no_grad():
        logits = network(model)(_split(layout, weights, torch.float64), torch.from_numpy(x).double())
    return np.asarray(logits.numpy(), np.float64)


def exact_scores(
    model: str, layout: Layout, weights: NDArray[np.float32], x: NDArray[np.float32]
) -> NDArray[np.float64]:
    """The diagonal score of every weight, ``theta_j**2 * mean_x sum_c (df_c / dtheta_j)**2``.

    One backward pass a sample and class, in double precision.

    Args:
        model: Name of a built-in model.
        layout: Its parameters.
        weights: ``float32[layout.size]``, dense.
        x: ``float32[batch, *input_shape]``.

    Returns:
        ``float64[layout.size]``, owned by the caller.
    """
    logits_of = network(model)
    parameters = _split(layout, weights, torch.float64)
    leaves = [value.requires_grad_() for value in parameters.values()]
    squares = [torch.zeros_like(value) for value in leaves]
    inputs = torch.from_numpy(x).double()
    for sample in inputs:
        logits = logits_of(parameters, sample[None])[0]
        for output in logits:
            gradients = torch.autograd.grad(output, leaves, retain_graph=True)
            for square, gradient in zip(squares, gradients, strict=True):
                square.addcmul_(gradient, gradient)
    with torch.no_grad():
        scores = [(value**2 * square / len(inputs)).reshape(-1) for value, square in zip(leaves, squares, strict=True)]
    return np.asarray(torch.cat(scores).numpy(), np.float64)


def exact_kernel_scores(
    model: str, layout: Layout, weights: NDArray[np.float32], x: NDArray[np.float32]
) -> NDArray[np.float64]:
    """NTK-SAP's score without its random perturbation: ``|2 G_j + theta_j dTr/dtheta_j|`` of every maskable weight.

    ``G_j = mean_x sum_c (df_c / dtheta_j)**2`` and ``Tr`` is its sum over the maskable weights: the derivative of
    ``E||f((theta + d) m) - f(theta m)||**2`` for a small ``d`` (arXiv 2304.02840, Eq. 7) with respect to the mask
    ``m``. Two backward passes a sample and class, in double precision.

    Args:
        model: Name of a built-in model.
        layout: Its parameters.
        weights: ``float32[layout.size]``, dense.
        x: ``float32[batch, *input_shape]``.

    Returns:
        ``float64[layout.size]``, owned by the caller; 0 where nothing is maskable.
    """
    logits_of = network(model)
    parameters = _split(layout, weights, torch.float64)
    leaves = [parameters[p.name].requires_grad_() for p in layout.parameters if p.maskable]
    squares = [torch.zeros_like(value) for value in leaves]
    slopes = [torch.zeros_like(value) for value in leaves]
    for sample in torch.from_numpy(x).double():
        for output in logits_of(parameters, sample[None])[0]:
            gradients = torch.autograd.grad(output, leaves, create_graph=True)
            trace = sum(((gradient**2).sum() for gradient in gradients), torch.zeros(()))
            for square, gradient in zip(squares, gradients, strict=True):
                square.addcmul_(gradient.detach(), gradient.detach())
            for slope, second in zip(slopes, torch.autograd.grad(trace, leaves, retain_graph=True), strict=True):
                slope.add_(second)
    scores = np.zeros(layout.size, np.float64)
    found = iter(zip(leaves, squares, slopes, strict=True))
    for position, parameter in enumerate(layout.parameters):
        if parameter.maskable:
            value, square, slope = next(found)
            exact = (2.0 * square + value.detach() * slope).abs() / len(x)
            scores[layout.slice_of(position)] = exact.numpy().ravel()
    return scores
