"""What structured pruning saves and costs: half of the channels against all of them.

``python -m benchmarks.structured [--json] [--keep 0.5] [--data fashion_mnist=FILE.npz cifar10=FILE.npz]``
``python -m benchmarks.structured --committed`` prints the committed result.

Time: a query of the artifact with fewer channels over one of the dense artifact, as a device would run them (blocked
graphs and several queries in a run where it finds them quicker), in turns within one process; ``portable`` are the
graphs for any machine, one query a run. ``{model}_time_ratio`` is at a batch of 8, without a mask. RAM: the planned
peak of training, without micro-batches and with portable graphs. Work: multiply-accumulates.

Accuracy: LeNet-5 by backpropagation (torch, Adam with cosine decay), the same number of steps for all; the peak rate is
chosen for each network and data set on a tenth of the training set at seed 0, test accuracy is that of the last step.
It says what the smaller structure can learn, not what an estimator makes of it. ``{data}_minus_dense`` is in points,
medians over the seeds. Digits come with scikit-learn; others are ``.npz`` files of arrays ``x y xt yt``.
"""

from __future__ import annotations

import argparse
import datetime as dt
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from fedzo.edge_runtime.datasets.data import Batch
from fedzo.edge_runtime.inference.ort import runtime_version
from fedzo.edge_runtime.planning.board_plan import RunSizes, plan_board
from fedzo.edge_runtime.storage.artifact import Artifact, load_artifact
from fedzo.exporter.artifact import export_artifact
from fedzo.exporter.narrow import ChannelSelection
from fedzo.exporter.reference import network
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import Manifest, golden_batch
from fedzo.protocol.pruning.mask import Mask

from .engine import SHAPES, Ours, interleaved_s, ratio, timed
from .report import Report

COMMITTED = Path(__file__).resolve().parent.parent / "docs" / "results" / "structured.json"
BATCHES = {"lenet5": (8, 32), "resnet20": (8,)}
RATES = (1e-3, 3e-3)
BATCH = 64
Arrays = Mapping[str, NDArray[Any]]


def artifacts(model: str, shape: tuple[int, ...], keep: float, scores: str, folder: Path) -> dict[str, Artifact]:
    """The dense artifact and the one with fewer channels, without a mask."""
    export_artifact(model, shape, 10, 0.0, 0, folder / "dense")
    export_artifact(model, shape, 10, 0.0, 0, folder / "structured", channels=ChannelSelection.of(keep, scores))
    return {name: load_artifact(folder / name) for name in ("dense", "structured")}


def planned_mib(manifest: Manifest, batch: int) -> float:
    """Planned peak of training."""
    return plan_board(manifest, 1e6, RunSizes(batch=batch)).peak.memory.planned_peak_mib


def times(
    models: Sequence[str], keep: float, scores: str, repeats: int, rows: list[dict[str, Any]], figures: dict[str, float]
) -> None:
    """Query time, RAM, work and parameters."""
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            pair = artifacts(model, SHAPES[model], keep, scores, Path(folder))
            whole, own = pair["dense"].manifest, pair["structured"].manifest
            assert whole.work is not None
            assert own.work is not None
            figures[f"{model}_work_ratio"] = (
                own.work.sample_multiply_accumulates / whole.work.sample_multiply_accumulates
            )
            figures[f"{model}_parameters_ratio"] = own.layout.size / whole.layout.size
            for size in BATCHES[model]:
                batch = Batch(*golden_batch(SHAPES[model], 10, 0, size))
                ours: dict[str, Ours] = {}
                for name, artifact in pair.items():
                    mask = Mask.dense(artifact.manifest.layout)
                    ours[name] = Ours(artifact, mask, batch, "hadamard")
                    ours[f"{name}_portable"] = Ours(artifact, mask, batch, "hadamard", "portable", 1)
                each = {name: one.queries for name, one in ours.items()}
                turns = repeats if model == "lenet5" else max(min(5, repeats), repeats // 3)
                taken = interleaved_s({name: timed(one.query) for name, one in ours.items()}, turns, each)
                end = "" if size == 8 else f"_b{size}"
                figures[f"{model}_time_ratio{end}"] = ratio(taken, "structured", "dense")
                figures[f"{model}_portable_time_ratio{end}"] = ratio(taken, "structured_portable", "dense_portable")
                figures[f"{model}_ram_saved_mib{end}"] = planned_mib(whole, size) - planned_mib(own, size)
                for name, one in ours.items():
                    manifest = one.engine.artifact.manifest
                    rows.append(
                        {
                            "model": model,
                            "what": name,
                            "batch": size,
                            "query_ms": 1e3 * statistics.median(taken[name]),
                            "planned_mib": planned_mib(manifest, size),
                            "parameters": manifest.layout.size,
                            "seed": "",
                            "rate": "",
                            "accuracy": "",
                        }
                    )


def digits() -> Arrays:
    """Scikit-learn's digits enlarged to 32x32: a fifth of them is the test set."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = np.kron(images.reshape(-1, 1, 8, 8) / 8.0 - 1.0, np.ones((4, 4))).astype(np.float32)
    order = np.random.Generator(np.random.Philox(0)).permutation(len(x))
    x, y = x[order], labels[order]
    return {"x": x[:1437], "y": y[:1437], "xt": x[1437:], "yt": y[1437:]}


def trained(manifest: Manifest, seed: int, rate: float, steps: int, data: Arrays) -> float:
    """Accuracy on ``xt`` after backpropagation from the initial weights of ``seed``."""
    layout, forward = manifest.layout, network(manifest.model)
    weights = initial_weights(layout, seed)
    parameters = {
        p.name: torch.from_numpy(weights[layout.slice_of(k)].reshape(p.shape).copy()).requires_grad_()
        for k, p in enumerate(layout.parameters)
    }
    x, y, xt, yt = (torch.from_numpy(np.ascontiguousarray(data[key])) for key in ("x", "y", "xt", "yt"))
    optimiser = torch.optim.Adam(parameters.values(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        drawn = torch.randint(len(x), (BATCH,), generator=generator)
        optimiser.zero_grad()
        loss = functional.cross_entropy(forward(parameters, x[drawn]), y[drawn].long())
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        answers = torch.cat([forward(parameters, part).argmax(1) for part in torch.split(xt, 500)])
    return float((answers == yt).double().mean())


def accuracies(
    data: Mapping[str, Arrays],
    keep: float,
    scores: str,
    seeds: int,
    steps: int,
    rows: list[dict[str, Any]],
    figures: dict[str, float],
) -> None:
    """Test accuracy of both structures on every data set."""
    for name, arrays in data.items():
        medians = {}
        held = len(arrays["x"]) // 10
        parts = {"x": arrays["x"][held:], "y": arrays["y"][held:], "xt": arrays["x"][:held], "yt": arrays["y"][:held]}
        with tempfile.TemporaryDirectory() as folder:
            pair = artifacts("lenet5", arrays["x"].shape[1:], keep, scores, Path(folder))
        for what, artifact in pair.items():
            manifest = artifact.manifest
            rate = max(RATES, key=lambda r: trained(manifest, 0, r, steps, parts))
            found = []
            for seed in range(seeds):
                found.append(trained(manifest, seed, rate, steps, arrays))
                rows.append(
                    {
                        "model": f"lenet5, {name}",
                        "what": what,
                        "batch": BATCH,
                        "query_ms": "",
                        "planned_mib": "",
                        "parameters": manifest.layout.size,
                        "seed": seed,
                        "rate": rate,
                        "accuracy": found[-1],
                    }
                )
            medians[what] = 100 * statistics.median(found)
            figures[f"{name}_{what}"] = medians[what]
        figures[f"{name}_minus_dense"] = medians["structured"] - medians["dense"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--committed", action="store_true", help="print the committed result, run nothing")
    parser.add_argument("--models", nargs="*", choices=list(BATCHES), default=list(BATCHES), help="timed; default: all")
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of channels (default %(default)s)")
    parser.add_argument("--scores", default="uniform", help="as --channel-scores (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=60, help="turns of LeNet-5 (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="of the accuracies (default %(default)s)")
    parser.add_argument("--steps", type=int, default=1500, help="of backpropagation (default %(default)s)")
    parser.add_argument("--data", nargs="*", default=[], metavar="NAME=FILE", help="more data sets than the digits")
    options = parser.parse_args()
    if options.committed:
        sys.stdout.write(COMMITTED.read_text(encoding="utf-8"))
        return
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    times(options.models, options.keep, options.scores, options.repeats, rows, figures)
    data: dict[str, Arrays] = {"digits": digits()} if options.seeds else {}
    for entry in options.data:
        name, _, file = entry.partition("=")
        data[name] = dict(np.load(file))
    accuracies(data, options.keep, options.scores, options.seeds, options.steps, rows, figures)
    settings = {
        "keep": options.keep,
        "scores": options.scores,
        "repeats": options.repeats,
        "seeds": options.seeds,
        "steps": options.steps,
        "onnxruntime": runtime_version(),
        "torch": torch.__version__,
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
    }
    Report(settings, rows, figures).write(as_json=options.json)


if __name__ == "__main__":
    main()
