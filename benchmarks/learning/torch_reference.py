"""What gradients reach: backpropagation on all data, and federated averaging on the same splits. Both in torch.

A sample costs three sample-forwards, one for the forward pass and two for the backward pass. Federated averaging is
that of McMahan et al. (arXiv 1602.05629): some local steps of SGD, then the mean of the weights by samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.exporter.reference import network
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import Manifest
from fedzo.simulation.clients import load_clients
from fedzo.simulation.simulate import simulate

from .build import artifact_of, run_settings, world_settings
from .cells import Cell
from .data import Parts

__all__ = ["BACKPROP_SF", "backprop", "fedavg"]

BACKPROP_SF = 3.0
_POINTS = 20
Parameters = dict[str, Tensor]


class _Network:
    """A network of the artifact's form with its initial weights and mask."""

    def __init__(self, cell: Cell, parts: Parts, work: Path) -> None:
        torch.set_num_threads(1)
        folder = artifact_of(cell, int(parts.x.shape[1]), work)
        self.manifest: Manifest = load_artifact(folder).manifest
        self._forward = network(self.manifest.model)
        kept = _mask(cell, parts, folder)
        layout = self.manifest.layout
        weights, self.masks, self.parameters = initial_weights(layout, cell.seed), {}, {}
        for number, parameter in enumerate(layout.parameters):
            part, shape = layout.slice_of(number), parameter.shape
            self.masks[parameter.name] = torch.from_numpy(kept[part].reshape(shape).astype(np.float32))
            self.parameters[parameter.name] = torch.from_numpy(weights[part].reshape(shape).copy())
            self.parameters[parameter.name] *= self.masks[parameter.name]
        self.survivors = int(kept.sum())
        self._xt, self.labels = parts.xt, torch.from_numpy(np.asarray(parts.yt))

    def loss(self, parameters: Parameters, x: NDArray[Any], y: NDArray[Any]) -> Tensor:
        """Mean cross-entropy under the mask."""
        masked = {name: value * self.masks[name] for name, value in parameters.items()}
        return functional.cross_entropy(self._forward(masked, torch.from_numpy(x)), torch.from_numpy(y))

    def accuracy(self, parameters: Parameters) -> float:
        """On the test set."""
        masked = {name: value.detach() * self.masks[name] for name, value in parameters.items()}
        right = 0
        with torch.no_grad():
            for first in range(0, len(self.labels), 500):
                x = torch.from_numpy(np.array(self._xt[first : first + 500]))
                right += int((self._forward(masked, x).argmax(1) == self.labels[first : first + 500]).sum())
        return right / len(self.labels)


def _mask(cell: Cell, parts: Parts, folder: Path) -> NDArray[np.bool_]:
    """The mask of a run with as many devices, which makes no update."""
    layout = load_artifact(folder).manifest.layout
    if cell.mask == "dense":
        return np.ones(layout.size, bool)
    names = {"saliency", "run"}
    kept = {k: v for k, v in cell.settings.items() if k.partition(".")[0] in names or k in ("devices", "participants")}
    bare = Cell(cell.data, "baseline", cell.mask, cell.world, cell.budget, cell.seed, settings=kept)
    settings = run_settings(bare, 0)
    world = world_settings(cell)
    return simulate(folder, settings, (parts.x, parts.y), None, world).mask.kept


def backprop(cell: Cell, parts: Parts, work: Path) -> dict[str, Any]:
    """Adam with cosine decay on all samples."""
    net = _Network(cell, parts, work)
    parameters = {name: value.clone().requires_grad_() for name, value in net.parameters.items()}
    batch = int(cell.settings["batch"])
    steps = max(1, int(cell.budget_sf / (BACKPROP_SF * batch)))
    optimiser = torch.optim.Adam(parameters.values(), lr=float(cell.settings["learning_rate"]))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    rng, every, curve = np.random.default_rng(cell.seed), max(1, -(-steps // _POINTS)), []
    draws = _batches(len(parts.y), batch, rng)
    for step in range(1, steps + 1):
        rows = next(draws)
        optimiser.zero_grad()
        net.loss(parameters, parts.x[rows], parts.y[rows]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if step % every == 0 or step == steps:
            curve.append([step * batch * BACKPROP_SF, net.accuracy(parameters)])
    return {"rounds": steps, **_outcome(curve, net)}


def fedavg(cell: Cell, parts: Parts, work: Path) -> dict[str, Any]:
    """Federated averaging with local SGD; the rate decays by a cosine over the rounds."""
    net = _Network(cell, parts, work)
    settings, world = cell.settings, world_settings(cell)
    devices = int(settings["devices"])
    clients = load_clients((parts.x, parts.y), net.manifest, world, devices).train
    asked, batch, local = int(settings["participants"]) or devices, int(settings["batch"]), int(settings["sgd_steps"])
    rounds = max(1, int(cell.budget_sf / (BACKPROP_SF * batch * local * asked)))
    rng, every, curve = np.random.default_rng(cell.seed), max(1, -(-rounds // _POINTS)), []
    shared, spent = net.parameters, 0
    for round_ in range(1, rounds + 1):
        rate = float(settings["learning_rate"]) * 0.5 * (1.0 + np.cos(np.pi * (round_ - 1) / rounds))
        chosen = rng.choice(devices, asked, replace=False)
        weight = np.array([len(clients[number]) for number in chosen], float)
        total = {name: torch.zeros_like(value) for name, value in shared.items()}
        for number, share in zip(chosen, weight / weight.sum(), strict=True):
            own = {name: value.clone().requires_grad_() for name, value in shared.items()}
            optimiser, draws = torch.optim.SGD(own.values(), lr=rate), _batches(len(clients[number]), batch, rng)
            for _ in range(local):
                rows = clients[number][next(draws)]
                optimiser.zero_grad()
                net.loss(own, parts.x[rows], parts.y[rows]).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                spent += len(rows)
            for name, value in own.items():
                total[name] += float(share) * value.detach()
        shared = total
        if round_ % every == 0 or round_ == rounds:
            curve.append([spent * BACKPROP_SF, net.accuracy(shared)])
    found = _outcome(curve, net)
    found |= {"bytes_up_per_device_round": 4.0 * net.survivors, "bytes_down_per_device_round": 4.0 * net.survivors}
    return {"rounds": rounds, **found}


def _batches(n: int, size: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Rows of one batch after another: shuffled passes; all rows where there are fewer."""
    size = min(size, n)
    while True:
        order = rng.permutation(n)
        for first in range(0, n - size + 1, size):
            yield np.sort(order[first : first + size])


def _outcome(curve: list[list[float]], net: _Network) -> dict[str, Any]:
    layout = net.manifest.layout
    removed = (layout.size - net.survivors) / max(1, layout.maskable_size)
    spent, accuracy = curve[-1]
    found = {"accuracy": accuracy, "n_test": len(net.labels), "sample_forwards": spent, "curve": curve}
    return {**found, "sparsity": removed}
