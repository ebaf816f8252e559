"""What a device process needs, planned and measured, and one step of backpropagation by torch beside it.

``python -m benchmarks.memory [--json] [--runs none|quick|all]``

Every row is a phase of a process of its own (:mod:`fedzo.edge_runtime.measure`) that does what a device does, but for
the connection: it scores, makes a mask, probes, updates and evaluates under the plan's limits. Peaks are ``VmHWM`` of
the whole process, Python and libraries included, reset between the phases. ``growth`` is the peak over that of the same
process before it loads a graph; ``tensors`` are ONNX Runtime's alone: the smallest limit under which the phase runs.

Rows with phase ``run`` are whole runs with a broker and a real ``fedzo-device``, which reports its own peak: a
connection, the state machine and real data come on top. ResNet-20 is scored for minutes, so the default leaves its
pruned runs out but for the smallest batch.

``peak_mib``: highest peak of the phases at the first sparsity. ``run_peak_mib``: that of the whole device, ``dense`` at
the last sparsity. ``torch_over_ours``: the peak of a plain SGD step of the same batch in torch, on the CPU, in
a process without anything else, over ``peak_mib``. ``plan_worst_error_percent``: largest difference between planned and
measured over all rows, ``run_worst_error_percent`` over the whole runs alone. ``plan_worst_under_mib``: by how much a
measured peak was over its plan at most, negative if it never was.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedzo.edge_runtime.child import answer_of
from fedzo.edge_runtime.versions import installed_versions
from fedzo.exporter.artifact import export_artifact

from .device_run import device_summary, write_samples
from .report import Report

SHAPES = {"lenet5": (1, 32, 32), "resnet20": (3, 32, 32)}
BUDGET_MIB = 160.0  # of the smallest 64-bit board, rpi-zero-2w
FIGURE_BATCH = 64


def phases_of(artifact: Path, batch: int, sparsity: float, *, tensors: bool) -> dict[str, Any]:
    """One device process; as many inputs are scored as a loss has samples."""
    arguments = [str(artifact), "--budget-mib", str(BUDGET_MIB), "--batch", str(batch), "--samples", str(batch)]
    arguments += ["--sparsity", str(sparsity), *(["--tensors"] if tensors else [])]
    return answer_of("fedzo.edge_runtime.measure", arguments)


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
    with tempfile.TemporaryDirectory() as folder:
        for model in models:
            artifact = Path(folder) / model
            export_artifact(model, SHAPES[model], 10, sparsities[0], 1, artifact)
            data = write_samples(Path(folder) / f"{model}.npz", SHAPES[model])
            for batch in batches:
                for sparsity in sparsities:
                    headline = batch == FIGURE_BATCH and sparsity == sparsities[0]
                    found = phases_of(artifact, batch, sparsity, tensors=headline)
                    rows += [_row(model, batch, sparsity, found, phase) for phase in found["phases"]]
                    quick = model == "lenet5" or sparsity == 0 or batch == min(batches)
                    if runs == "all" or (runs == "quick" and quick):
                        summary = device_summary(artifact, data, BUDGET_MIB, batch, sparsity)
                        rows.append(_run_row(model, batch, sparsity, summary))
                        if batch == FIGURE_BATCH:
                            kind = "" if sparsity == sparsities[0] else "dense_"
                            figures[f"run_peak_mib_{model}_{kind}b{batch}"] = summary["peak_rss_mib"]
                    if headline:
                        torch = answer_of("fedzo.exporter.backprop_step", [str(artifact), "--batch", str(batch)])
                        rows.append(_torch_row(model, batch, torch))
                        name = f"{model}_b{batch}"
                        figures[f"peak_mib_{name}"] = found["peak_mib"]
                        figures[f"torch_over_ours_{name}"] = torch["peak_mib"] / found["peak_mib"]
                        figures[f"growth_mib_{name}"] = found["peak_mib"] - found["floor_mib"]
                        figures[f"torch_growth_mib_{name}"] = torch["peak_mib"] - torch["before_mib"]
                        needs = [phase["tensors_mib"] for phase in found["phases"]]
                        if None not in needs:
                            figures[f"tensor_mib_{name}"] = max(needs)
    ours = [row for row in rows if row["phase"] != "torch"]
    for name, part in (("plan", ours), ("run", [row for row in ours if row["phase"] == "run"])):
        if part:
            figures[f"{name}_worst_error_percent"] = max(
                100 * abs(row["planned_mib"] - row["measured_mib"]) / row["measured_mib"] for row in part
            )
            figures[f"{name}_worst_under_mib"] = max(row["measured_mib"] - row["planned_mib"] for row in part)
    settings = {
        "budget_mib": BUDGET_MIB,
        "batches": list(batches),
        "sparsities": list(sparsities),
        "onnxruntime": installed_versions()["onnxruntime"],
    }
    return Report(settings, rows, figures)


def _row(model: str, batch: int, sparsity: float, found: dict[str, Any], phase: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": model,
        "batch": batch,
        "sparsity": sparsity,
        "phase": phase["phase"],
        "micro_batch": phase["micro_batch"],
        "planned_mib": phase["planned_mib"],
        "measured_mib": phase["measured_mib"],
        "growth_mib": phase["measured_mib"] - found["floor_mib"],
        "planned_tensors_mib": phase["planned_tensors_mib"],
        "tensors_mib": phase["tensors_mib"],
    }


def _run_row(model: str, batch: int, sparsity: float, summary: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": model,
        "batch": batch,
        "sparsity": sparsity,
        "phase": "run",
        "micro_batch": None,
        "planned_mib": summary["planned_peak_mib"],
        "measured_mib": summary["peak_rss_mib"],
        "growth_mib": None,
        "planned_tensors_mib": None,
        "tensors_mib": None,
    }


def _torch_row(model: str, batch: int, torch: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": model,
        "batch": batch,
        "sparsity": 0.0,
        "phase": "torch",
        "micro_batch": batch,
        "planned_mib": None,
        "measured_mib": torch["peak_mib"],
        "growth_mib": torch["peak_mib"] - torch["before_mib"],
        "planned_tensors_mib": None,
        "tensors_mib": None,
    }


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
