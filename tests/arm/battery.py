"""What an Arm processor must compute like every other one. Runs there, as ``python -m tests.arm.battery FOLDER``.

FOLDER is what ``tests.arm.reference`` wrote natively. Prints one JSON object and ends with exit code 7 when a bit of
the protocol differs, or a forward pass by more than float32 arithmetic in another order explains.
Needs what a board has: numpy, onnxruntime, fedzo.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fedzo.edge_runtime.datasets.data import Batch
from fedzo.edge_runtime.estimation.estimators import SteinEstimator
from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.inference.golden_check import check_predictions
from fedzo.edge_runtime.installation.versions import installed_versions
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import golden_batch
from fedzo.protocol.errors import FedzoError
from fedzo.protocol.perturbation.directions import Directions
from fedzo.protocol.pruning.mask import Mask, threshold
from fedzo.protocol.replay.update import weights_digest
from tests.protocol.golden import cases, message_cases, round_cases

LENET, RESNET = "lenet5", "resnet20"
REFERENCE = "reference.json"
MISMATCH = 7
SIGMA = 2.0**-10
GOLDEN = Path(cases.__file__).parent

# Largest difference to the reference over the largest reference value: several times what was seen on emulated
# Cortex-A53, A72, A76 (aarch64 wheels) and A7, A8 (Debian's armhf build), docs/arm.md.
TOLERANCES = {"loss": 1e-6, "scalars": 2e-3, "logits": 1e-4, "shifted": 1e-4, "moments": 1e-4, "resnet20 logits": 1e-4}


def small_mask(folder: Path) -> Mask:
    """A fifth of LeNet-5, by the size of its initial weights."""
    manifest = load_artifact(folder / LENET).manifest
    return threshold(manifest.layout, np.abs(initial_weights(manifest.layout, manifest.seed)), 0.8)


def exact(folder: Path) -> dict[str, str]:
    """What must be the same bits everywhere and is in no committed vector."""
    manifest = load_artifact(folder / LENET).manifest
    weights = initial_weights(manifest.layout, manifest.seed)
    mask = small_mask(folder)
    replica = cases.replay("hadamard", "adam", 2_003, 24, updates=50)
    return {
        "initial weights": weights_digest(weights).hex(),
        "mask": mask.digest.hex(),
        "mask feeds": cases.sha256(mask.index()) + cases.sha256(mask.counts()),
        "replay of 50 updates": replica.digest.hex(),
    }


def close(folder: Path) -> dict[str, list[float]]:
    """Forward passes; they agree up to the order of float32 sums.

    Raises:
        SelfTestError: The known answer of an artifact is missed.
    """
    artifact = load_artifact(folder / LENET)
    manifest, mask = artifact.manifest, small_mask(folder)
    weights = initial_weights(manifest.layout, manifest.seed)[mask.survivors()]
    x, y = golden_batch(manifest.input_shape, manifest.n_classes, 5, 12)
    shift = np.zeros(manifest.n_units, dtype=np.float32)
    shift[[1, 9, 40]] = 0.01, -0.5, 0.25
    out: dict[str, list[float]] = {}
    with Engine(artifact, mask, micro_batch=8) as engine:
        out["golden difference"] = [engine.check_golden()]
        with Engine(artifact, Mask.dense(manifest.layout), micro_batch=8) as dense:
            out["golden predictions difference"] = [check_predictions(dense) or 0.0]
        estimator = SteinEstimator(Directions("hadamard", 3, mask.n_survivors), SIGMA, two_sided=True)
        scalars = estimator.probe(engine, weights, Batch(x, y), 2, np.array([0, 7, 500, 1_000]))
        out["scalars"], out["loss"] = _plain(scalars.values), [scalars.mean_loss]
        out["logits"] = _plain(engine.logits(weights, x))
        out["shifted"] = _plain(engine.shifted_logits(weights, x, shift))
        out["moments"] = _plain(engine.moments(weights, x))
    artifact = load_artifact(folder / RESNET)
    manifest = artifact.manifest
    x, _ = golden_batch(manifest.input_shape, manifest.n_classes, 5, 1)
    with Engine(artifact, Mask.dense(manifest.layout), micro_batch=1) as engine:
        out["resnet20 logits"] = _plain(engine.logits(initial_weights(manifest.layout, manifest.seed), x))
    return out


def _plain(values: Any) -> list[float]:
    return [float(value) for value in values.ravel()]


def keeps_denormals() -> bool:
    """Whether numpy computes with denormals in this thread."""
    return bool((np.full(64, 1e-40, dtype=np.float32) * np.float32(0.5)).all())


def check(folder: Path) -> dict[str, Any]:
    """Everything; the mismatches are in ``failed``."""
    started = time.monotonic()
    failed: list[str] = []
    reference = json.loads((folder / REFERENCE).read_text(encoding="utf-8"))

    def compare(name: str, same: bool) -> None:
        if not same:
            failed.append(name)

    denormals = [keeps_denormals()]
    differences: dict[str, float] = {}
    try:
        found = close(folder)
    except FedzoError as error:
        failed.append(str(error))
        found = {}
    denormals.append(keeps_denormals())
    for name, values in found.items():
        wanted = reference["close"][name]
        if name in TOLERANCES:
            largest = np.abs(np.array(values) - np.array(wanted)).max() / np.abs(wanted).max()
            differences[name] = float(f"{largest:.2g}")
            compare(name, bool(largest <= TOLERANCES[name]))
        else:
            differences[name] = float(f"{values[0]:.2g}")
    forward_s = time.monotonic() - started

    # After the forward passes, in the same thread: ONNX Runtime must not have changed its floating-point mode.
    compare("onnxruntime changed how numpy treats denormals", denormals[0] == denormals[1])
    compare("denormals", all(denormals) or platform.machine() != "aarch64")
    for name, value in exact(folder).items():
        compare(name, value == reference["exact"][name])
    decoded = Mask.decode(bytes.fromhex(reference["encoded mask"]), load_artifact(folder / LENET).manifest.layout)
    compare("mask codec", decoded == small_mask(folder))
    vectors = json.loads((GOLDEN / "vectors.json").read_text(encoding="utf-8"))
    vectors |= json.loads(round_cases.ROUNDS.read_text(encoding="utf-8"))
    for name, case in {**cases.CASES, **round_cases.CASES}.items():
        compare(f"golden vectors: {name}", case() == vectors[name])
    messages = json.loads((GOLDEN / "messages.json").read_text(encoding="utf-8"))
    compare("golden messages", message_cases.compute() == messages)
    return {
        "machine": platform.machine(),
        "versions": installed_versions(),
        "denormals": denormals[0],
        "vectors": list(vectors),
        "differences": differences,
        "forward_s": round(forward_s, 1),
        "seconds": round(time.monotonic() - started, 1),
        "failed": failed,
    }


def main() -> int:
    """Print the answer of this processor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of tests.arm.reference")
    parser.add_argument("--cpu", default="", help="its name, for the answer")
    arguments = parser.parse_args()
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    answer = {"cpu": arguments.cpu, **check(arguments.folder)}
    print(json.dumps(answer), flush=True)  # noqa: T201
    return MISMATCH if answer["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
