"""Exact gradients by automatic differentiation: what zeroth-order estimates are compared with."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ..exporter.reference import network
from ..protocol.artifact.layout import Layout
from ..protocol.artifact.manifest import Manifest
from ..protocol.pruning.mask import Mask

__all__ = ["accuracy", "directional_derivative", "exact_gradient", "trained"]

_PART = 512
torch.set_num_threads(1)  # these networks are too small for more, least of all on a busy machine


def _tensors(layout: Layout, dense: NDArray[np.float32], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        p.name: torch.from_numpy(dense[layout.slice_of(k)].reshape(p.shape).copy()).to(dtype)
        for k, p in enumerate(layout.parameters)
    }


def exact_gradient(
    manifest: Manifest, dense: NDArray[np.float32], x: NDArray[np.float32], y: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Gradient of the mean cross-entropy, in double precision: ``float64[layout.size]``, owned by the caller."""
    forward = network(manifest.model)
    parameters = {name: t.requires_grad_() for name, t in _tensors(manifest.layout, dense, torch.float64).items()}
    total = np.zeros(manifest.layout.size)
    for start in range(0, len(x), _PART):
        samples, labels = (torch.from_numpy(np.ascontiguousarray(a[start : start + _PART])) for a in (x, y))
        loss = functional.cross_entropy(forward(parameters, samples.double()), labels, reduction="sum")
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        total += torch.cat([g.reshape(-1) for g in gradients]).numpy()
    return total / len(x)


def directional_derivative(
    manifest: Manifest,
    dense: NDArray[np.float32],
    direction: NDArray[np.float32],
    x: NDArray[np.float32],
    y: NDArray[np.int64],
) -> float:
    """Derivative of the mean cross-entropy along ``direction float32[layout.size]``, by forward-mode differentiation.

    Double precision, no backward pass: the exact value that a difference of losses approaches.
    """
    forward = network(manifest.model)
    samples, labels = torch.from_numpy(np.ascontiguousarray(x)).double(), torch.from_numpy(np.ascontiguousarray(y))

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional.cross_entropy(forward(parameters, samples), labels)

    primals = _tensors(manifest.layout, dense, torch.float64)
    tangents = _tensors(manifest.layout, direction, torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own rules for it are scripted
        return float(torch.func.jvp(loss, (primals,), (tangents,))[1])


def trained(
    manifest: Manifest,
    mask: Mask,
    dense: NDArray[np.float32],
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    *,
    steps: int,
    seed: int,
    rate: float = 1e-3,
    batch: int = 64,
) -> NDArray[np.float32]:
    """Train the survivors by backpropagation: Adam with cosine decay.

    Args:
        manifest: Names a built-in model.
        mask: The removed weights stay at 0.
        dense: ``float32[layout.size]``, where to start.
        x: Samples.
        y: Their classes.
        steps: Of the optimiser.
        seed: Of the batches.
        rate: Peak learning rate.
        batch: Samples of a step.

    Returns:
        ``float32[layout.size]``, dense, owned by the caller.
    """
    forward, layout = network(manifest.model), manifest.layout
    start = np.where(mask.kept, dense, np.float32(0.0))
    if steps == 0:
        return start
    parameters = {name: t.requires_grad_() for name, t in _tensors(layout, start, torch.float32).items()}
    kept = _tensors(layout, mask.kept.astype(np.float32), torch.float32)
    optimiser = torch.optim.Adam(parameters.values(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        drawn = torch.randint(len(x), (batch,), generator=generator).numpy()
        samples, labels = torch.from_numpy(x[drawn]), torch.from_numpy(y[drawn])
        optimiser.zero_grad()
        functional.cross_entropy(forward(parameters, samples), labels).backward()  # type: ignore[no-untyped-call]
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            parameter.grad.mul_(kept[name])
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        return torch.cat([t.reshape(-1) for t in parameters.values()]).numpy()


def accuracy(manifest: Manifest, dense: NDArray[np.float32], x: NDArray[np.float32], y: NDArray[np.int64]) -> float:
    """Part of the samples whose largest logit is that of their class."""
    parameters = _tensors(manifest.layout, dense, torch.float32)
    forward, right = network(manifest.model), 0
    with torch.no_grad():
        for start in range(0, len(x), _PART):
            logits = forward(parameters, torch.from_numpy(np.ascontiguousarray(x[start : start + _PART])))
            right += int((logits.argmax(1).numpy() == y[start : start + _PART]).sum())
    return right / len(x)
