"""What a device process needs, planned and measured, and one step of backpropagation by torch beside it.

``python -m benchmarks.memory [--json] [--runs none|quick|all]``

Every row is a phase of a process of its own (:mod:`fedzo.edge_runtime.planning.measure`) that does what a device does,
but for the connection, which is without TLS: it scores, makes a mask, probes, updates and evaluates under the plan's
limits. Peaks are ``VmHWM`` of the whole process, Python and libraries included, reset between the phases; ``anonymous``
is the peak of what is not the code of libraries, ``code`` that of the code. ``growth`` is the peak over that of the
same process before it loads a graph; ``tensors`` are ONNX Runtime's alone: the smallest limit under which the phase
runs. The plan chooses the micro-batch under the row's budget: that of the smallest 64-bit board, and for the rows of
the figures the target in :data:`TARGETS_MIB`.

How much code is resident depends on the kernel's page cache: Linux 6.18 on ext4 keeps a library that was just
installed in pieces of up to 2 MiB, and maps them whole. So the libraries are taken out of the page cache first, as
after a start of the machine. What other processes hold stays there: run this alone.

Rows with phase ``run`` are whole runs with a broker and a real ``fedzo-device``, which reports its own peak since its
start: a connection, the state machine and real data come on top. ResNet-20 is scored for minutes, so the default leaves
out its pruned runs but for the smallest batch and the figures'.

``peak_mib``: highest peak since the process started, at the first sparsity. ``run_peak_mib``: that of the whole device,
``dense`` at the last sparsity. ``start_mib``: the peak before the first phase. ``torch_over_ours``: the peak of a plain
SGD step of the same batch in torch, on the CPU, in a process without anything else, over ``peak_mib``.
``micro_batch``: the one that the plan chose under the target, and ``micro_batch_time`` the time of its queries over
that of micro-batch 32. ``plan_worst_error_percent``: largest difference between planned and measured over all rows,
``run_worst_error`` over the whole runs alone, ``anonymous_worst_error`` without code. ``…_worst_under_mib``: by how
much a measured peak was over its plan at most, negative if it never was.

Rows that name an estimator are LeNet-5's training with it at batch 64, with graphs that stay loaded, and under the
target with one graph at a time. ``estimators_worst_error_percent`` and ``estimators_worst_under_mib`` are those of the
latter, ``kept_worst_under_mib`` and ``kept_worst_over_mib`` of the former: by how much the peak was over and under the
plan at most.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedzo.edge_runtime.installation.versions import installed_versions
from fedzo.edge_runtime.planning.child import answer_of
from fedzo.exporter.artifact import export_artifact

from .device_run import device_summary, write_samples
from .report import Report

SHAPES = {"lenet5": (1, 32, 32), "resnet20": (3, 32, 32)}
BUDGET_MIB = 160.0  # of the smallest 64-bit board, rpi-zero-2w
ESTIMATORS = {"split": False, "node": False, "coordinate": False, "local": True, "local-node": True}
"""Those beside ``stein``, and whether they need local heads."""
TARGETS_MIB = {"lenet5": 60.0, "resnet20": 66.0}
FIGURE_BATCH = 64
TIMED_PROCESSES = 3
LIBRARIES = ("numpy", "onnxruntime")


def phases_of(artifact: Path, batch: int, sparsity: float, budget_mib: float, *more: str) -> dict[str, Any]:
    """One device process; as many inputs are scored as a loss has samples."""
    arguments = [str(artifact), "--budget-mib", str(budget_mib), "--batch", str(batch), "--samples", str(batch)]
    return answer_of("fedzo.edge_runtime.planning.measure", [*arguments, "--sparsity", str(sparsity), *more])


def time_over_full(artifact: Path, batch: int, sparsity: float, micro_batch: int) -> float:
    """Time of a query over that with micro-batch 32: the fastest of some processes each, in turn."""
    fastest = {micro_batch: float("inf"), 32: float("inf")}
    for size in list(fastest) * TIMED_PROCESSES:
        found = phases_of(artifact, batch, sparsity, BUDGET_MIB, "--micro-batch", str(size))
        fastest[size] = min(fastest[size], found["phases"][-1]["query_s"])
    return fastest[micro_batch] / fastest[32]


def forget_libraries() -> int:
    """Take the libraries out of the page cache, as far as nobody has them mapped.

    Returns:
        How many files were asked for.
    """
    folders = [
        Path(spec.origin).parent for name in LIBRARIES if (spec := importlib.util.find_spec(name)) and spec.origin
    ]
    folders += [folder.with_name(f"{folder.name}.libs") for folder in folders]
    files = [path for folder in folders for path in folder.rglob("*.so*")]
    files += Path(sysconfig.get_path("platstdlib")).rglob("lib-dynload/*.so")
    files += [
        Path(sysconfig.get_config_var("LIBDIR") or "") / (sysconfig.get_config_var("INSTSONAME") or ""),
        Path(sys.executable),
    ]
    for path in files:
        with contextlib.suppress(OSError), path.open("rb") as file:
            os.fsync(file.fileno())  # pages that still have to be written cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return len(files)


def measure(models: Sequence[str], batches: Sequence[int], sparsities: Sequence[float], runs: str) -> Report:
    """Every model at every batch and sparsity, and torch at batch 64.

    Args:
        models: Keys of :data:`SHAPES`.
        batches: Samples behind a loss, and inputs that are scored.
        sparsities: The first one is that of the figures.
        runs: Which whole runs to make: ``none``, ``quick`` or ``all``.

    Raises:
        FedzoError: A process failed.
    """
    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    forget_libraries()
    with tempfile.TemporaryDirectory() as folder:
        for model in models:
            artifact = Path(folder) / model
            export_artifact(model, SHAPES[model], 10, sparsities[0], 1, artifact)
            data = write_samples(Path(folder) / f"{model}.npz", SHAPES[model])
            for batch in batches:
                for sparsity in sparsities:
                    headline = batch == FIGURE_BATCH and sparsity == sparsities[0]
                    budget = TARGETS_MIB[model] if headline else BUDGET_MIB
                    found = phases_of(artifact, batch, sparsity, budget, *(["--tensors"] if headline else []))
                    rows += [_row(model, batch, sparsity, found, phase) for phase in found["phases"]]
                    quick = model == "lenet5" or sparsity == 0 or batch == min(batches) or headline
                    if runs == "all" or (runs == "quick" and quick):
                        summary = device_summary(artifact, data, budget, batch, sparsity)
                        rows.append(_run_row(model, batch, sparsity, budget, summary))
                        if batch == FIGURE_BATCH:
                            kind = "" if sparsity == sparsities[0] else "dense_"
                            figures[f"run_peak_mib_{model}_{kind}b{batch}"] = summary["peak_rss_mib"]
                    if headline:
                        torch = answer_of("fedzo.exporter.backprop_step", [str(artifact), "--batch", str(batch)])
                        rows.append(_torch_row(model, batch, torch))
                        name = f"{model}_b{batch}"
                        figures[f"peak_mib_{name}"] = found["peak_mib"]
                        figures[f"start_mib_{name}"] = found["start_mib"]
                        chosen = min(phase["micro_batch"] for phase in found["phases"])  # a device takes one for all
                        figures[f"micro_batch_{name}"] = chosen
                        figures[f"micro_batch_time_{name}"] = time_over_full(artifact, batch, sparsity, chosen)
                        figures[f"torch_over_ours_{name}"] = torch["peak_mib"] / found["peak_mib"]
                        figures[f"growth_mib_{name}"] = found["peak_mib"] - found["floor_mib"]
                        figures[f"torch_growth_mib_{name}"] = torch["peak_mib"] - torch["before_mib"]
                        needs = [phase["tensors_mib"] for phase in found["phases"]]
                        if None not in needs:
                            figures[f"tensor_mib_{name}"] = max(needs)
        wanted = "lenet5" in models and FIGURE_BATCH in batches
        of_estimators = estimator_rows(Path(folder), sparsities[0]) if wanted else []
    if of_estimators:
        figures |= _estimator_figures(of_estimators)
    ours = [row for row in rows if row["phase"] != "torch"]
    rows += of_estimators
    phases = [row for row in ours if row["phase"] != "run"]
    for name, part, planned, measured in (
        ("plan", ours, "planned_mib", "measured_mib"),
        ("run", [row for row in ours if row["phase"] == "run"], "planned_mib", "measured_mib"),
        ("anonymous", phases, "planned_anonymous_mib", "anonymous_mib"),
    ):
        if part:
            figures[f"{name}_worst_error_percent"] = max(
                100 * abs(r[planned] - r[measured]) / r[measured] for r in part
            )
            figures[f"{name}_worst_under_mib"] = max(row[measured] - row[planned] for row in part)
    settings = {
        "budget_mib": BUDGET_MIB,
        "targets_mib": TARGETS_MIB,
        "batches": list(batches),
        "sparsities": list(sparsities),
        "onnxruntime": installed_versions()["onnxruntime"],
    }
    return Report(settings, rows, figures)


def estimator_rows(folder: Path, sparsity: float) -> list[dict[str, Any]]:
    """Training of LeNet-5 with every estimator, where graphs stay loaded and where one is loaded at a time."""
    rows = []
    for local_heads in (False, True):
        artifact = folder / ("with_heads" if local_heads else "without_heads")
        export_artifact("lenet5", SHAPES["lenet5"], 10, sparsity, 1, artifact, local_heads=local_heads)
        for estimator in (name for name, has_heads in ESTIMATORS.items() if has_heads is local_heads):
            for budget in (BUDGET_MIB, TARGETS_MIB["lenet5"]):
                more = ["--estimator", estimator, "--pruning", "erk"]  # so that nothing is scored
                found = phases_of(artifact, FIGURE_BATCH, sparsity, budget, *more)
                (training,) = found["phases"]
                graphs = "stay loaded" if training["keeps_graphs"] else "one at a time"
                row = _row("lenet5", FIGURE_BATCH, sparsity, found, training)
                rows.append({**row, "estimator": estimator, "graphs": graphs})
    return rows


def _estimator_figures(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    kept = [row for row in rows if row["graphs"] == "stay loaded"]
    single = [row for row in rows if row not in kept]
    return {
        "estimators_worst_error_percent": max(
            100 * abs(row["planned_mib"] - row["measured_mib"]) / row["measured_mib"] for row in single
        ),
        "estimators_worst_under_mib": max(row["measured_mib"] - row["planned_mib"] for row in single),
        "kept_worst_under_mib": max(row["measured_mib"] - row["planned_mib"] for row in kept),
        "kept_worst_over_mib": max(row["planned_mib"] - row["measured_mib"] for row in kept),
    }


_COLUMNS = ("micro_batch", "planned_mib", "measured_mib", "planned_anonymous_mib", "anonymous_mib", "code_mib")


def _row(model: str, batch: int, sparsity: float, found: dict[str, Any], phase: dict[str, Any]) -> dict[str, Any]:
    return {
        **_start(model, batch, sparsity, phase["phase"], found["budget_mib"]),
        **{name: phase[name] for name in _COLUMNS},
        "growth_mib": phase["measured_mib"] - found["floor_mib"],
        "planned_tensors_mib": phase["planned_tensors_mib"],
        "tensors_mib": phase["tensors_mib"],
        "query_ms": None if phase["query_s"] is None else 1e3 * phase["query_s"],
    }


def _run_row(model: str, batch: int, sparsity: float, budget_mib: float, summary: dict[str, Any]) -> dict[str, Any]:
    row = _start(model, batch, sparsity, "run", budget_mib)
    return {**row, "planned_mib": summary["planned_peak_mib"], "measured_mib": summary["peak_rss_mib"]}


def _torch_row(model: str, batch: int, torch: dict[str, Any]) -> dict[str, Any]:
    growth = torch["peak_mib"] - torch["before_mib"]
    row = _start(model, batch, 0.0, "torch", None)
    row |= {"estimator": None, "graphs": None}
    return {**row, "micro_batch": batch, "measured_mib": torch["peak_mib"], "growth_mib": growth}


def _start(model: str, batch: int, sparsity: float, phase: str, budget_mib: float | None) -> dict[str, Any]:
    """A row with every column, so that all rows have the same."""
    values = (*_COLUMNS, "growth_mib", "planned_tensors_mib", "tensors_mib", "query_ms")
    head = {"model": model, "batch": batch, "sparsity": sparsity, "phase": phase, "budget_mib": budget_mib}
    return {**head, **dict.fromkeys(values), "estimator": "stein", "graphs": "one at a time"}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, FIGURE_BATCH])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 0.0])
    parser.add_argument("--runs", choices=("none", "quick", "all"), default="quick", help="whole runs (default quick)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    measure(arguments.models, arguments.batches, arguments.sparsities, arguments.runs).write(as_json=arguments.json)


if __name__ == "__main__":
    main()
