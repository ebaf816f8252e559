"""How close a loss query on a board comes to plain inference, and how far torch is from both.

``python -m benchmarks.engine [--json] [--models lenet5 resnet20] [--batches 8 32] [--repeats 60]``

A query is what a device does for one number: make the direction, perturb the surviving weights, put them into the
network, one forward pass, the loss. The limit is a forward pass of the same network with its weights as constants and
every optimisation of ONNX Runtime, blocked convolutions included; it ends at the logits. One thread each.

``query_over_limit``: a query over the limit, as the device would run it: several in one run where it measured at its
start that they are quicker. ``single_query_over_limit`` and ``batched_query_over_limit``: with either. The limit is
what ONNX Runtime makes of the exported graph by itself; our graph of a query is rewritten further, and shares the
first layer, so that it can be quicker than that. ``run_over_same_graph``: one run of our graph of a single query over
that very graph with constant weights. ``torch_pair_over_ours``: a central pair of losses in torch, eager, as in MeZO
(Malladi et al., NeurIPS 2023: seeded in-place perturbation of all weights, three passes over them), over such a pair
of ours. ``vmap_over_ours``: eight losses by ``torch.func.vmap`` over eight perturbed copies, over eight queries.
``direction_share``: the part of a single query that makes the direction.

Torch runs in a process of its own, as a user would run it: its memory allocator does not meet that of ONNX Runtime.

All candidates run in turn, again and again; a figure is the median over these turns of the ratio of thread CPU times
within one turn, so that what else the machine does cancels out.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
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

from fedzo.edge_runtime.datasets.data import Batch
from fedzo.edge_runtime.estimation.estimators import SteinEstimator
from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.inference.layout_choice import LayoutChoice
from fedzo.edge_runtime.inference.ort import runtime, runtime_version
from fedzo.edge_runtime.inference.query_batches import QueriesChoice
from fedzo.edge_runtime.inference.variants import block_size, wanted_variants
from fedzo.edge_runtime.storage.artifact import Artifact, load_artifact
from fedzo.exporter.artifact import export_artifact
from fedzo.exporter.blocked_layout import optimised_by_runtime
from fedzo.exporter.blocked_rewrites import stay_blocked
from fedzo.exporter.passes.fold_weights import FoldWeights
from fedzo.exporter.reference import network
from fedzo.protocol.artifact.layout import Layout, initial_weights
from fedzo.protocol.artifact.manifest import golden_batch
from fedzo.protocol.perturbation.buffers import aligned_zeros
from fedzo.protocol.perturbation.directions import FAMILIES, Directions, Family
from fedzo.protocol.pruning.mask import Mask, threshold

from .report import Report

SHAPES = {"lenet5": (1, 32, 32), "resnet20": (3, 32, 32)}
LEAST_S = 4e-3
SIGMA = 2.0**-10
VMAP_DIRECTIONS = 8
TORCH_BATCH = 32

Candidates = Mapping[str, Callable[[int], float]]
"""Each makes a number of calls in a row and returns the thread CPU seconds of all."""


def timed(call: Callable[[], object]) -> Callable[[int], float]:
    """A candidate of this process."""

    def run(number: int) -> float:
        before = time.thread_time()
        for _ in range(number):
            call()
        return time.thread_time() - before

    return run


def interleaved_s(
    candidates: Candidates, repeats: int, each: Mapping[str, int] | None = None
) -> dict[str, list[float]]:
    """Thread CPU seconds of every candidate in every turn; each turn begins with another one.

    Short calls are made several times in a row, so that their data are in the caches as in a device's loop.

    Args:
        candidates: By name.
        repeats: Turns.
        each: Queries of one call, by name, that the seconds are divided by; 1 by default.
    """
    names = list(candidates)
    numbers = {}
    for name in names:
        candidates[name](1)
        numbers[name] = max(1, round(LEAST_S / max(candidates[name](1), 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(candidates[name](numbers[name]) / numbers[name] / (each or {}).get(name, 1))
    return times


def ratio(times: Mapping[str, Sequence[float]], above: str, below: str) -> float:
    """Median over the turns of ``above / below``."""
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))


class Ours:
    """One engine and what a device holds beside it."""

    def __init__(
        self,
        artifact: Artifact,
        mask: Mask,
        batch: Batch,
        family: Family,
        layout: LayoutChoice = "auto",
        queries: QueriesChoice = "auto",
    ) -> None:
        manifest = artifact.manifest
        self.engine = Engine(artifact, mask, micro_batch=len(batch.x), layout=layout, queries=queries)
        self.batch = batch
        self.weights = initial_weights(manifest.layout, manifest.seed)[mask.survivors()]
        self.directions = Directions(family, 1, mask.n_survivors)
        self.two_sided = SteinEstimator(self.directions, SIGMA, two_sided=True)
        self.out = aligned_zeros(mask.n_survivors)
        self.position = 0

    def direction(self) -> None:
        """The next direction."""
        self.position += 1
        self.directions.scaled(0, self.position, np.float32(SIGMA), self.out)

    @property
    def queries(self) -> int:
        """Queries in one run."""
        return self.engine.query_batches.chosen(self.batch.x, self.batch.y)

    def query(self) -> object:
        """Losses at the weights moved along the next directions, as many as one run takes."""
        feeds = self.engine.query_batches.feeds(self.batch.x, self.batch.y)
        for feed in feeds:
            self.position += 1
            self.directions.scaled(0, self.position, np.float32(SIGMA), feed)
            np.add(self.weights, feed, out=feed)
        return self.engine.losses(feeds, self.batch.x, self.batch.y)

    def run(self) -> object:
        """One run of the graph of a single query on the weights that it holds."""
        return self.engine.loss(self.engine.weights_feed, self.batch.x, self.batch.y)

    def pairs(self) -> object:
        """Central differences, as the agent computes them: as many pairs as fill a run."""
        positions = np.arange(self.position + 1, self.position + 1 + self.pairs_at_once)
        self.position += self.pairs_at_once
        return self.two_sided.probe(self.engine, self.weights, self.batch, 0, positions)

    @property
    def pairs_at_once(self) -> int:
        """Pairs of one call of :meth:`pairs`."""
        return max(1, self.queries // 2)


def limit(
    artifact: Artifact, dense: np.ndarray[Any, Any], name: str, feeds: Mapping[str, Any], *, same_graph: bool = False
) -> Callable[[], object]:
    """The graph with constant weights, as ONNX Runtime runs a model that it may optimise.

    With ``same_graph`` it is rewritten as the graph of a query is, and then left alone.
    """
    ort = runtime()
    model = FoldWeights(artifact.manifest.layout, dense)(onnx.load_from_string(artifact.read_graph(name))).model
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    if same_graph and block_size():
        model = optimised_by_runtime(model)[0]
        stay_blocked(model, block_size())
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
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


class TorchProcess:
    """:class:`Torch` in a process of its own; its calls are timed there."""

    def __init__(self, model: str, layout: Layout, dense: np.ndarray[Any, Any], batch: Batch) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve_torch, args=(other, model, layout, dense, batch), daemon=True)
        self._process.start()

    def candidate(self, name: str) -> Callable[[int], float]:
        """Times ``pair`` or ``vmapped``."""

        def run(number: int) -> float:
            self._pipe.send((name, number))
            if not self._pipe.poll(300):
                raise TimeoutError("torch has not answered for 300 s")
            return float(self._pipe.recv())

        return run

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(10)
        self._process.kill()


def _serve_torch(pipe: Any, model: str, layout: Layout, dense: np.ndarray[Any, Any], batch: Batch) -> None:
    torch.set_num_threads(1)
    peer = Torch(model, layout, dense, batch)
    calls = {"pair": timed(peer.pair), "vmapped": timed(peer.vmapped)}
    with contextlib.suppress(EOFError):
        while True:
            name, number = pipe.recv()
            pipe.send(calls[name](number))


def measure(models: Sequence[str], batches: Sequence[int], repeats: int, density: float, family: Family) -> Report:
    """All rows and figures; ResNet-20 takes a third of the turns."""
    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    for model in models:
        turns = repeats if model == "lenet5" else max(min(5, repeats), repeats // 3)
        with tempfile.TemporaryDirectory() as folder:
            export_artifact(model, SHAPES[model], 10, 1.0 - density, 0, Path(folder) / model)
            artifact = load_artifact(Path(folder) / model)
            layout = artifact.manifest.layout
            weights = initial_weights(layout, 0)
            mask = threshold(layout, np.abs(weights), 1.0 - density)
            dense = np.where(mask.kept, weights, np.float32(0.0))
            for size in batches:
                batch = Batch(*golden_batch(SHAPES[model], 10, 0, size))
                _measure_queries(model, artifact, mask, dense, batch, family, turns, rows, figures)
            batch = Batch(*golden_batch(SHAPES[model], 10, 0, TORCH_BATCH))
            _measure_torch(model, artifact, mask, dense, batch, family, max(min(5, turns), turns // 3), rows, figures)
    settings = {
        "density": density,
        "family": family,
        "repeats": repeats,
        "onnxruntime": runtime_version(),
        "torch": torch.__version__,
    }
    return Report(settings, rows, figures)


def _measure_queries(
    model: str,
    artifact: Artifact,
    mask: Mask,
    dense: np.ndarray[Any, Any],
    batch: Batch,
    family: Family,
    turns: int,
    rows: list[dict[str, Any]],
    figures: dict[str, float],
) -> None:
    size, x = len(batch.x), {"x": batch.x}
    chosen, single = Ours(artifact, mask, batch, family), Ours(artifact, mask, batch, family, queries=1)
    portable = Ours(artifact, mask, batch, family, "portable", 1)
    forms = {"query": chosen, "single_query": single, "portable_query": portable}
    batched = next((v.queries for v in wanted_variants(artifact.manifest) if v.queries > 1), 0)
    if batched:
        forms["batched_query"] = Ours(artifact, mask, batch, family, queries=batched)
    candidates = {
        "limit": timed(limit(artifact, dense, "predict.onnx", x)),
        "limit_with_loss": timed(limit(artifact, dense, "probe.onnx", {**x, "y": batch.y})),
        "same_graph": timed(limit(artifact, dense, "probe.onnx", {**x, "y": batch.y}, same_graph=True)),
        "run": timed(single.run),
        "direction": timed(single.direction),
        **{name: timed(ours.query) for name, ours in forms.items()},
    }
    each = {name: ours.queries for name, ours in forms.items()}
    times = interleaved_s(candidates, turns, each)
    end = f"{model}_b{size}"
    figures[f"query_over_limit_{end}"] = ratio(times, "query", "limit")
    figures[f"queries_in_a_run_{end}"] = each["query"]
    figures[f"single_query_over_limit_{end}"] = ratio(times, "single_query", "limit")
    if batched:
        figures[f"batched_query_over_limit_{end}"] = ratio(times, "batched_query", "limit")
        figures[f"batched_over_single_query_{end}"] = ratio(times, "batched_query", "single_query")
    figures[f"run_over_same_graph_{end}"] = ratio(times, "run", "same_graph")
    figures[f"direction_share_{end}"] = ratio(times, "direction", "single_query")
    rows += [_row(model, size, name, times, "limit") for name in candidates]


def _measure_torch(
    model: str,
    artifact: Artifact,
    mask: Mask,
    dense: np.ndarray[Any, Any],
    batch: Batch,
    family: Family,
    turns: int,
    rows: list[dict[str, Any]],
    figures: dict[str, float],
) -> None:
    ours = Ours(artifact, mask, batch, family)
    peer = TorchProcess(model, artifact.manifest.layout, dense, batch)
    try:
        candidates = {
            "pair": timed(ours.pairs),
            "torch_pair": peer.candidate("pair"),
            "query": timed(ours.query),
            "torch_vmap": peer.candidate("vmapped"),
        }
        each = {"pair": ours.pairs_at_once, "query": ours.queries, "torch_vmap": VMAP_DIRECTIONS}
        times = interleaved_s(candidates, turns, each)
    finally:
        peer.close()
    figures[f"torch_pair_over_ours_{model}"] = ratio(times, "torch_pair", "pair")
    figures[f"vmap_over_ours_{model}"] = ratio(times, "torch_vmap", "query")
    rows += [_row(model, len(batch.x), name, times, "pair") for name in ("pair", "torch_pair")]
    rows += [_row(model, len(batch.x), name, times, "query") for name in ("query", "torch_vmap")]


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
