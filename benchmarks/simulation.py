"""What a round with many virtual devices costs, and how much of it is the devices' own work.

``python -m benchmarks.simulation [--json] [--devices 1000] [--rounds 3] [--k 20] [--batch 16] [--processes 0]``

LeNet-5 on 32x32 images, dense, estimator ``stein``; the images are noise, which takes the same time as any others.
The time of a round is that of the run from its first training announcement to its last update, over the rounds. Shares
are of processor time, so that whatever else runs on the machine does not count, or hardly: with shared caches a busy
machine computes slower. ``forward``: inside ONNX Runtime; ``engine``: that, and putting weights in place; ``work``:
all that boards would do too. The rest is the simulation's: machines, messages, queues.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from fedzo.exporter.artifact import export_artifact
from fedzo.protocol.settings import RunSettings, TrainingSettings
from fedzo.simulation.process_pool import ProcessPool
from fedzo.simulation.settings import SimulationSettings
from fedzo.simulation.simulate import simulate

from .report import Report

SAMPLES_PER_DEVICE = 32


def measure(devices: int, rounds: int, k: int, batch: int, processes: int) -> Report:
    """Run one simulation."""
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (SAMPLES_PER_DEVICE * devices, 1, 32, 32)).astype(np.uint8)
    y = rng.integers(0, 10, len(x))
    training = TrainingSettings(rounds=rounds, estimator="stein", k=k, batch=batch)
    settings = RunSettings(sparsity=0.0, devices=devices, quorum=1, evaluate_every=0, training=training)
    pool = ProcessPool(processes)
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "lenet5"
        export_artifact("lenet5", (1, 32, 32), 10, 0.0, 1, artifact)
        found = simulate(artifact, settings, (x, y), None, SimulationSettings(), pool=pool)
    round_s, cpu_s = found.training_wall_s / rounds, found.training_cpu_s / rounds
    row = {
        "devices": devices,
        "round_s": round_s,
        "round_cpu_s": cpu_s,
        "forward_share": found.forward_cpu_share,
        "engine_share": found.engine_cpu_share,
        "work_share": found.work_cpu_share,
        "start_s": found.start_wall_s,
        "bytes_up": found.bytes_up_per_device_round,
        "peak_rss_mib": found.peak_rss_mib,
        "digest": found.digest,
    }
    name = f"lenet5_{devices}"
    figures = {
        f"simulation_round_s_{name}": round_s,
        f"simulation_round_cpu_s_{name}": cpu_s,
        f"simulation_round_cpu_over_cores_s_{name}": cpu_s / found.processes,
        f"simulation_forward_share_{name}": found.forward_cpu_share,
        f"simulation_engine_share_{name}": found.engine_cpu_share,
        f"simulation_work_share_{name}": found.work_cpu_share,
    }
    asked = {"devices": devices, "rounds": rounds, "k": k, "batch": batch, "processes": found.processes}
    return Report({**asked, "model": "lenet5", "estimator": "stein"}, [row], figures)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--devices", type=int, default=1000, help="virtual devices (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds to average over (default %(default)s)")
    parser.add_argument("--k", type=int, default=20, help="directions per device (default %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="samples behind a loss (default %(default)s)")
    parser.add_argument("--processes", type=int, default=0, help="processes; 0: one a core (default %(default)s)")
    arguments = parser.parse_args()
    found = measure(arguments.devices, arguments.rounds, arguments.k, arguments.batch, arguments.processes)
    found.write(as_json=arguments.json)


if __name__ == "__main__":
    main()
