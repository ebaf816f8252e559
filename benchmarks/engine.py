"""How close a loss query on a board comes to plain inference, and how far torch is from both.

``python -m benchmarks.engine [--json] [--models lenet5 resnet20] [--batches 8 32] [--repeats 60]``

A query is what a device does for one number: make the direction, perturb the surviving weights, put them into the
network, one forward pass, the loss. The limit is a forward pass of the same network with its weights as constants and
every optimisation of ONNX Runtime, blocked convolutions included; it ends at the logits. One thread each.

``query_over_limit``: a query over the limit. ``torch_pair_over_ours``: a central pair of losses in torch, eager, as in
MeZO (Malladi et al., NeurIPS 2023: seeded in-place perturbation of all weights, three passes over them), over such a
pair of ours. ``vmap_over_ours``: eight losses by ``torch.func.vmap`` over eight perturbed copies, over eight queries.
``direction_share``: the part of a query that makes the direction.

All candidates run in turn, again and again; a figure is the median over these turns of the ratio of thread CPU times
within one turn, so that what else the machine does cancels out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch.nn import functional

from fedzo.edge_runtime.artifact import Artifact, load_artifact
from fedzo.edge_runtime.data import Batch
from fedzo.edge_runtime.engine import Engine, LayoutChoice
from fedzo.edge_runtime.estimators import SteinEstimator
from fedzo.edge_runtime.ort import runtime, runtime_version
from fedzo.exporter.artifact import export_artifact
from fedzo.exporter.passes.fold_weights import FoldWeights
from fedzo.exporter.reference import network
from fedzo.protocol.directions import FAMILIES, Directions, Family
from fedzo.protocol.layout import Layout, initial_weights
from fedzo.protocol.manifest import golden_batch
from fedzo.protocol.mask import Mask, threshold

from .report import Report

SHAPES = {"lenet5": (1, 32, 32), "resnet20": (3, 32, 32)}
LEAST_S = 4e-3
SIGMA = 2.0**-10
VMAP_DIRECTIONS = 8
TORCH_BATCH = 32

Candidates = Mapping[str, Callable[[], object]]


def interleaved_s(candidates: Candidates, repeats: int) -> dict[str, list[float]]:
    """Thread CPU seconds of one call of every candidate in every turn; each turn begins with another one.

    Short calls are made several times in a row, so that their data are in the caches as in a device's loop.
    """
    names = list(candidates)
    numbers = {}
    for name in names:
        candidates[name]()
        before = time.thread_time()
        candidates[name]()
        numbers[name] = max(1, round(LEAST_S / max(time.thread_time() - before, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            before = time.thread_time()
            for _ in range(numbers[name]):
                candidates[name]()
            times[name].append((time.thread_time() - before) / numbers[name])
    return times


def ratio(times: Mapping[str, Sequence[float]], above: str, below: str) -> float:
    """Median over the turns of ``above / below``."""
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))


class Ours:
    """One engine and what a device holds beside it."""

    def __init__(self, artifact: Artifact, mask: Mask, batch: Batch, family: Family, layout: LayoutChoice) -> None:
        manifest = artifact.manifest
        self.engine = Engine(artifact, mask, micro_batch=len(batch.x), layout=layout)
        self.batch = batch
        self.weights = initial_weights(manifest.layout, manifest.seed)[mask.survivors()]
        self.directions = Directions(family, 1, mask.n_survivors)
        self.two_sided = SteinEstimator(self.directions, SIGMA, two_sided=True)
        self.out = np.empty(mask.n_survivors, np.float32)
        self.position = 0

    def direction(self) -> None:
        """The next direction."""
        self.position += 1
        self.directions.direction(0, self.position, self.out)

    def query(self) -> float:
        """One loss at the weights moved along the next direction."""
        self.direction()
        feed = self.engine.weights_feed
        np.multiply(self.out, np.float32(SIGMA), out=feed)
        np.add(self.weights, feed, out=feed)
        return self.engine.loss(feed, self.batch.x, self.batch.y)

    def pair(self) -> object:
        """One central difference, as the agent computes it."""
        self.position += 1
        positions = np.array([self.position])
        return self.two_sided.probe(self.engine, self.weights, self.batch, 0, positions)


def limit(artifact: Artifact, dense: np.ndarray[Any, Any], name: str, feeds: Mapping[str, Any]) -> Callable[[], object]:
    """The graph with constant weights, as ONNX Runtime runs a model that it may optimise."""
    ort = runtime()
    model = FoldWeights(artifact.manifest.layout, dense)(onnx.load_from_string(artifact.read_graph(name))).model
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for key, value in feeds.items():
        binding.bind_input(key, "cpu", 0, value.dtype.type, list(value.shape), value.ctypes.data)
    binding.bind_output(session.get_outputs()[0].name, "cpu")
    return lambda: session.run_with_iobinding(binding)


class Torch:
    """The same losses in torch, eager, on the same dense weights."""

    def __init__(self, model: str, layout: Layout, dense: np.ndarray[Any, Any], batch: Batch) -> None:
        self._network = network(model)
        self._parameters = {
            p.name: torch.from_numpy(dense[layout.slice_of(k)].reshape(p.shape).copy())
            for k, p in enumerate(layout.parameters)
        }
        self._x, self._y = torch.from_numpy(batch.x), torch.from_numpy(batch.y)
        self._generator = torch.Generator()
        self._seed = 0

    def _loss(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return functional.cross_entropy(self._network(parameters, self._x), self._y)

    def _move(self, scale: float) -> None:
        self._generator.manual_seed(self._seed)
        for value in self._parameters.values():
            value.add_(torch.randn(value.shape, generator=self._generator), alpha=scale)

    def pair(self) -> float:
        """MeZO: up, loss, down, loss, back."""
        self._seed += 1
        with torch.no_grad():
            self._move(SIGMA)
            plus = float(self._loss(self._parameters))
            self._move(-2 * SIGMA)
            minus = float(self._loss(self._parameters))
            self._move(SIGMA)
        return (plus - minus) / (2 * SIGMA)

    def vmapped(self) -> torch.Tensor:
        """Losses of eight perturbed copies at once."""
        self._seed += 1
        self._generator.manual_seed(self._seed)
        with torch.no_grad():
            copies = {
                name: value + SIGMA * torch.randn((VMAP_DIRECTIONS, *value.shape), generator=self._generator)
                for name, value in self._parameters.items()
            }
            losses: torch.Tensor = torch.func.vmap(self._loss)(copies)
        return losses


def measure(models: Sequence[str], batches: Sequence[int], repeats: int, density: float, family: Family) -> Report:
    """All rows and figures; ResNet-20 takes a third of the turns."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    for model in models:
        turns = repeats if model == "lenet5" else max(5, repeats // 3)
        with tempfile.TemporaryDirectory() as folder:
            export_artifact(model, SHAPES[model], 10, 1.0 - density, 0, Path(folder) / model)
            artifact = load_artifact(Path(folder) / model)
            layout = artifact.manifest.layout
            weights = initial_weights(layout, 0)
            mask = threshold(layout, np.abs(weights), 1.0 - density)
            dense = np.where(mask.kept, weights, np.float32(0.0))
            for size in batches:
                x, y = golden_batch(SHAPES[model], 10, 0, size)
                ours = Ours(artifact, mask, Batch(x, y), family, "auto")
                portable = Ours(artifact, mask, Batch(x, y), family, "portable")
                candidates = {
                    "limit": limit(artifact, dense, "predict.onnx", {"x": x}),
                    "limit_with_loss": limit(artifact, dense, "probe.onnx", {"x": x, "y": y}),
                    "query": ours.query,
                    "direction": ours.direction,
                    "portable_query": portable.query,
                }
                times = interleaved_s(candidates, turns)
                figures[f"query_over_limit_{model}_b{size}"] = ratio(times, "query", "limit")
                figures[f"direction_share_{model}_b{size}"] = ratio(times, "direction", "query")
                rows += [_row(model, size, name, times, "limit") for name in candidates]
            x, y = golden_batch(SHAPES[model], 10, 0, TORCH_BATCH)
            ours, peer = Ours(artifact, mask, Batch(x, y), family, "auto"), Torch(model, layout, dense, Batch(x, y))
            candidates = {
                "pair": ours.pair,
                "torch_pair": peer.pair,
                "eight_queries": lambda ours=ours: [ours.query() for _ in range(VMAP_DIRECTIONS)],  # type: ignore[misc]
                "torch_vmap": peer.vmapped,
            }
            times = interleaved_s(candidates, max(5, turns // 3))
            figures[f"torch_pair_over_ours_{model}"] = ratio(times, "torch_pair", "pair")
            figures[f"vmap_over_ours_{model}"] = ratio(times, "torch_vmap", "eight_queries")
            rows += [_row(model, TORCH_BATCH, name, times, "pair") for name in ("pair", "torch_pair")]
            rows += [_row(model, TORCH_BATCH, name, times, "eight_queries") for name in ("eight_queries", "torch_vmap")]
    settings = {
        "density": density,
        "family": family,
        "repeats": repeats,
        "onnxruntime": runtime_version(),
        "torch": torch.__version__,
    }
    return Report(settings, rows, figures)


def _row(model: str, batch: int, name: str, times: Mapping[str, Sequence[float]], base: str) -> dict[str, Any]:
    return {
        "model": model,
        "batch": batch,
        "what": name,
        "cpu_ms": 1e3 * statistics.median(times[name]),
        "over": base,
        "ratio": ratio(times, name, base),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="default: all")
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32], help="samples a query (default 8 32)")
    parser.add_argument("--repeats", type=int, default=300, help="turns of LeNet-5 (default %(default)s)")
    parser.add_argument("--density", type=float, default=0.2, help="surviving part (default %(default)s)")
    parser.add_argument("--family", choices=FAMILIES, default="hadamard", help="directions (default %(default)s)")
    arguments = parser.parse_args()
    report = measure(arguments.models, arguments.batches, arguments.repeats, arguments.density, arguments.family)
    report.write(as_json=arguments.json)


if __name__ == "__main__":
    main()
