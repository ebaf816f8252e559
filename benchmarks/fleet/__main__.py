"""What ten thousand boards cost: time, memory and bytes of a round, and the time to come back after a crash.

``python -m benchmarks.fleet [--json] [--devices 10000] [--parts rounds traffic recovery]``

A real server (``fedzo serve`` with its journal on the disk), a real Mosquitto on loopback, and boards that are real to
both: each has a connection of its own, the state machine of a device, and reports of K scalars. Only the scalars are
random numbers. All boards live in one process, which shares the machine with server and broker.

``rounds``: a fleet, then a small one. ``close_10000_reports_s``: all reports are ready and sent at the same moment; the
time runs from the first of them to the update at a board, which is published once all reports and the update are on the
disk. ``coordinator_peak_mib``: ``VmHWM`` of the server's process from its start, enrolment included.
``cost_per_report_10000_over_100``: the server's processor time for a whole round (announcement, reports, receipts,
update) over the reports, of the fleet and of the small one. All three are medians over rounds, the peak of all.

``traffic``: a real ``fedzo-device`` behind a network cable of its own (a namespace, 1,500 bytes a packet): every IP
packet of the connection from one announcement to another, over the rounds, MQTT's and TCP's acknowledgements included,
TLS not. ``fedavg_over_ours``: bytes both ways of a client that publishes all its weights as float32 and gets as many
back, by the same broker and cable, over ours. This part needs root.

``recovery``: the server is killed in the middle of a round, with a long run in its journal, and started again at once.
``recovery_s``: from the kill to the next new round's announcement at a board; median over the kills.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.exporter.artifact import export_artifact
from fedzo.protocol.errors import FedzoError

from ..report import Report, whole
from .recovery import measure_recovery
from .rounds import measure_rounds
from .traffic import Bytes, measure_device, measure_weights
from .wire import can_capture

PARTS = ("rounds", "traffic", "recovery")
SHAPES = {"lenet5": (1, 32, 32), "resnet20": (3, 32, 32)}
BATCHES = {"lenet5": 16, "resnet20": 2}  # what is sent does not depend on it
SPARSITY = 0.8


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    add("--devices", type=whole, default=10_000, help="boards of the fleet")
    add("--small", type=whole, default=100, help="boards of the small fleet")
    add("--k", type=whole, default=100, help="directions of a report")
    add("--rounds", type=whole, default=5, help="rounds of the fleet")
    add("--small-rounds", type=whole, default=40, help="rounds of the small fleet")
    add("--models", nargs="+", choices=tuple(SHAPES), default=list(SHAPES), help="whose bytes are counted")
    add("--traffic-rounds", type=whole, default=20, help="rounds that bytes are averaged over")
    add("--recovery-devices", type=whole, default=1_000, help="boards of the run whose server is killed")
    add("--recovery-rounds", type=whole, default=1_000, help="rounds in its journal")
    add("--kills", type=whole, default=5, help="times that it is killed")
    asked = parser.parse_args()
    try:
        measure(asked).write(as_json=asked.json)
    except FedzoError as error:
        print(f"error: {error.message}" + (f" ({error.hint})" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    return 0


def measure(asked: argparse.Namespace) -> Report:
    """Everything that was asked for."""
    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        artifact = _exported(folder, "lenet5")
        if "rounds" in asked.parts:
            _rounds(asked, artifact, folder, rows, figures)
        if "traffic" in asked.parts:
            _traffic(asked, folder, rows, figures)
        if "recovery" in asked.parts:
            place = _folder(folder, "recovery")
            found = measure_recovery(place, asked.recovery_devices, asked.recovery_rounds, asked.k, asked.kills)
            rows += [_row("recovery", row) for row in found]
            figures["recovery_s"] = statistics.median(row["recovery_s"] for row in found)
            figures["recovery_worst_s"] = max(row["recovery_s"] for row in found)
    names = ("devices", "small", "k", "recovery_devices", "recovery_rounds")
    settings: dict[str, Any] = {name: getattr(asked, name) for name in names}
    settings |= {"model": "lenet5", "sparsity": SPARSITY, "estimator": "stein", "assignment": "shared"}
    settings["date"] = dt.datetime.now(dt.timezone.utc).date().isoformat()
    return Report(settings, rows, figures)


def _exported(folder: Path, model: str) -> Path:
    path = folder / model
    if not path.exists():
        export_artifact(model, SHAPES[model], 10, SPARSITY, 1, path)
    return path


def _folder(folder: Path, name: str) -> Path:
    path = folder / f"run-{name}"
    path.mkdir()
    return path


def _row(what: str, values: dict[str, Any]) -> dict[str, Any]:
    """A measurement; the table for people has one column for all of its numbers."""
    return {"what": what, **values}


def _rounds(
    asked: argparse.Namespace, artifact: Path, folder: Path, rows: list[dict[str, Any]], figures: dict[str, float]
) -> None:
    large = measure_rounds(artifact, _folder(folder, "large"), asked.devices, asked.k, asked.rounds)
    small = measure_rounds(artifact, _folder(folder, "small"), asked.small, asked.k, asked.small_rounds)
    for result in (large, small):
        rows += [_row("round", row) for row in result.rows]
    figures[f"close_{asked.devices}_reports_s"] = large.close_s
    figures["coordinator_peak_mib"] = large.peak_mib
    figures[f"cost_per_report_{asked.devices}_over_{asked.small}"] = large.cost_per_report_us / small.cost_per_report_us
    figures[f"cost_per_report_us_{asked.devices}"] = large.cost_per_report_us
    figures[f"cost_per_report_us_{asked.small}"] = small.cost_per_report_us
    figures[f"enrol_{asked.devices}_s"] = large.enrol_s


def _traffic(asked: argparse.Namespace, folder: Path, rows: list[dict[str, Any]], figures: dict[str, float]) -> None:
    if not can_capture():
        print("bytes are not counted: that needs Linux, root and network namespaces", file=sys.stderr)
        return
    ours: dict[str, Bytes] = {}
    for model in asked.models:
        artifact = _exported(folder, model)
        size = load_artifact(artifact).manifest.layout.size
        ours[model] = measure_device(artifact, _folder(folder, model), asked.k, asked.traffic_rounds, BATCHES[model])
        weights = measure_weights(size, min(asked.traffic_rounds, 5))
        for what, found in (("round", ours[model]), ("weights", weights)):
            rows.append(_row(f"{model}, {what}", found.row()))
        figures[f"fedavg_over_ours_{model}"] = (weights.up + weights.down) / (ours[model].up + ours[model].down)
    figures[f"bytes_up_k{asked.k}"] = max(found.up for found in ours.values())
    figures[f"bytes_down_k{asked.k}"] = max(found.down for found in ours.values())


if __name__ == "__main__":
    sys.exit(main())
