"""What one step of backpropagation costs in memory: ``python -m fedzo.exporter.backprop_step ARTIFACT --batch 64``.

The built-in models in torch: forward, loss, backward, and a plain SGD update in place, twice. It is a process of its
own, so that its peak (``VmHWM``, one JSON object on stdout) is that of training. Two things are in torch's favour:
torch.optim is left out, and what importing the exporter adds (onnx) is subtracted.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch.nn import functional

from ..protocol.artifact.layout import initial_weights
from ..protocol.artifact.manifest import Manifest, golden_batch
from ..protocol.errors import FedzoError

__all__ = ["main", "step"]


def step(manifest: Manifest, batch: int, micro_batch: int) -> float:
    """Two SGD steps on ``batch`` samples, whose gradients are summed over micro-batches.

    Returns:
        The loss before the second step.

    Raises:
        ConfigError: The model is none of the built-in ones.
    """
    from .reference import network

    forward = network(manifest.model)
    weights = initial_weights(manifest.layout, manifest.seed)
    parameters = {
        p.name: torch.from_numpy(weights[manifest.layout.slice_of(k)].reshape(p.shape).copy()).requires_grad_()
        for k, p in enumerate(manifest.layout.parameters)
    }
    inputs, labels = golden_batch(manifest.input_shape, manifest.n_classes, 1, batch)
    x, y = torch.from_numpy(inputs), torch.from_numpy(labels)
    total = 0.0
    for _ in range(2):
        total = 0.0
        for start in range(0, batch, micro_batch):
            part = slice(start, start + micro_batch)
            loss = functional.cross_entropy(forward(parameters, x[part]), y[part], reduction="sum") / batch
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        with torch.no_grad():
            for parameter in parameters.values():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
                    parameter.grad = None
    return total


def _status_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) / 1024
    return 0.0


def main() -> int:
    """Print ``{"peak_mib": ..., "before_mib": ..., "loss": ...}``; ``before_mib`` is torch without a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, help="default: the batch at once")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        manifest = Manifest.decode((options.artifact / "manifest.json").read_bytes())
        torch_mib = _status_mib("VmRSS")
        from . import reference  # noqa: F401 (its memory is measured here)

        before = _status_mib("VmRSS")
        loss = step(manifest, options.batch, options.micro_batch or options.batch)
    except (FedzoError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    peak = _status_mib("VmHWM") - (before - torch_mib)
    sys.stdout.write(json.dumps({"peak_mib": peak, "before_mib": torch_mib, "loss": loss}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
