"""What the phases of a run really use on this machine: ``python -m fedzo.edge_runtime.measure ARTIFACT ...``.

A process of its own that does what a device does, without a connection: everything is imported, the plan is made under
the budget and its limit of the arena is enforced; then it scores a few units, makes a mask, probes, updates and
evaluates. The peak (``VmHWM``) is reset between the phases. Prints one JSON object.

Tensor bytes are the smallest limit of the arena under which a phase still runs, found by bisection.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import ssl
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..protocol.directions import Directions
from ..protocol.errors import FedzoError, MemoryBudgetError
from ..protocol.layout import initial_weights
from ..protocol.manifest import Manifest, golden_batch
from ..protocol.mask import Mask, threshold
from ..protocol.optimisers import OptimiserConfig
from ..protocol.saliency import gaussian_inputs
from ..protocol.update import Replica
from . import agent as _agent
from .artifact import Artifact, load_artifact
from .board_plan import BoardPlan, PhasePlan, RunSizes, plan_board
from .data import Batch
from .engine import Engine
from .estimators import SteinEstimator
from .memory import peak_rss_mib, reset_peak
from .ort import arena_limit_holds, runtime, runtime_version

__all__ = ["PhaseMeasurement", "main", "measure"]

_POSITIONS: Final = 2
_UPDATES: Final = 2
_RESOLUTION_BYTES: Final = 8 << 10
_imported = _agent  # the client and the state machine are in a device's memory as well


@dataclasses.dataclass(frozen=True, slots=True)
class PhaseMeasurement:
    """One phase, planned and measured.

    Attributes:
        phase: ``scoring`` or ``training``.
        micro_batch: Samples of one run.
        planned_mib: What the plan says for the process.
        measured_mib: Peak of the process in this phase.
        planned_tensors_mib: Limit of ONNX Runtime's tensors, which is enforced.
        tensors_mib: What they need; None if not asked for, or if this ONNX Runtime enforces no limit.
        feeds_mib: Arrays of this package as planned.
    """

    phase: str
    micro_batch: int
    planned_mib: float
    measured_mib: float
    planned_tensors_mib: float
    tensors_mib: float | None
    feeds_mib: float


class _Run:
    """One run on one machine, from the dense weights to an evaluation."""

    def __init__(self, artifact: Artifact, plan: BoardPlan, sizes: RunSizes) -> None:
        self.artifact, self.plan, self.sizes = artifact, plan, sizes
        manifest = artifact.manifest
        sparsity = manifest.sparsity if sizes.sparsity is None else sizes.sparsity
        dense = Mask.dense(manifest.layout)
        scores = np.abs(initial_weights(manifest.layout, manifest.seed))
        self.mask = threshold(manifest.layout, scores, sparsity) if sparsity > 0 else dense
        self.masks = {"scoring": dense, "training": self.mask}

    def engine(self, phase: PhasePlan, arena_bytes: int) -> Engine:
        """An engine with the portable graphs, which run on every board."""
        return Engine(
            self.artifact,
            self.masks[phase.phase],
            threads=self.sizes.threads,
            micro_batch=phase.memory.micro_batch,
            arena_bytes=arena_bytes,
            layout="portable",
        )

    def carry_out(self, phase: PhasePlan) -> None:
        """Do what a device does in a phase.

        Raises:
            MemoryBudgetError: A tensor does not fit under the plan's limit.
        """
        manifest, mask = self.artifact.manifest, self.masks[phase.phase]
        replica = _replica(manifest, mask)
        with self.engine(phase, phase.memory.arena_bytes) as engine:
            if phase.phase == "scoring":
                score(engine, replica.weights, gaussian_inputs(manifest, 1, 0, 0, self.sizes.samples))
            else:
                train(engine, replica, manifest, self.sizes.batch)

    def tensor_bytes(self, phase: PhasePlan) -> int:
        """The smallest limit of the arena under which every graph of the phase runs."""
        manifest, mask = self.artifact.manifest, self.masks[phase.phase]
        weights = initial_weights(manifest.layout, manifest.seed)[mask.kept]
        count = min(phase.memory.micro_batch, self.sizes.batch if phase.phase == "training" else self.sizes.samples)
        x, y = golden_batch(manifest.input_shape, manifest.n_classes, 1, count)
        calls: list[Callable[[Engine], object]]
        if phase.phase == "scoring":
            shift = np.zeros(manifest.n_units, np.float32)
            calls = [lambda e: e.moments(weights, x), lambda e: e.shifted_logits(weights, x, shift)]
        else:
            calls = [lambda e: e.loss(weights, x, y), lambda e: e.logits(weights, x)]
        return max(self._smallest(phase, call) for call in calls)

    def _smallest(self, phase: PhasePlan, call: Callable[[Engine], object]) -> int:
        low, high = 0, phase.memory.arena_bytes
        while high - low > _RESOLUTION_BYTES:
            middle = (low + high) // 2
            try:
                with self.engine(phase, middle) as engine:
                    call(engine)
                    call(engine)
                high = middle
            except FedzoError:  # over the limit, when the graph is loaded or when it runs
                low = middle
        return high


def score(engine: Engine, weights: NDArray[np.float32], x: NDArray[np.float32]) -> None:
    """The passes of the saliency, but only two of the shifted ones for each micro-batch."""
    engine.moments(weights, x)
    shift = np.zeros(engine.artifact.manifest.n_units, np.float32)
    for start in range(0, len(x), engine.micro_batch):
        part = x[start : start + engine.micro_batch]
        clean = np.empty((len(part), engine.artifact.manifest.n_classes), np.float32)
        moved = np.empty_like(clean)
        np.copyto(engine.weights_feed, weights)
        engine.shifted_logits(engine.weights_feed, part, shift, out=clean)
        shift[0] = 0.01
        engine.shifted_logits(engine.weights_feed, part, shift, out=moved)
        shift[0] = 0.0


def train(engine: Engine, replica: Replica, manifest: Manifest, batch: int) -> None:
    """Probes, updates and an evaluation of one batch."""
    # As in the agent: directions of their own for the thread that computes.
    directions = Directions("hadamard", 1, replica.weights.size)
    estimator = SteinEstimator(directions, 2.0**-10)
    samples = Batch(*golden_batch(manifest.input_shape, manifest.n_classes, 1, batch))
    for update in range(_UPDATES):
        positions = np.arange(update * _POSITIONS, (update + 1) * _POSITIONS, dtype=np.int64)
        estimator.probe(engine, replica.weights, samples, update, positions)
        coefficients = np.full(_POSITIONS, 0.5, np.float32)
        replica.prepare(update, update, 2.0**-10, ((update * _POSITIONS, _POSITIONS),), coefficients)
    engine.evaluate(replica.weights, samples.x, samples.y)


def _replica(manifest: Manifest, mask: Mask) -> Replica:
    return Replica(manifest.layout, mask, manifest.seed, 1, "hadamard", OptimiserConfig("adam"))


def measure(artifact: Artifact, budget_mib: float, sizes: RunSizes, *, tensors: bool) -> dict[str, Any]:
    """Carry out every phase in this process.

    Args:
        artifact: The model.
        budget_mib: For the plan.
        sizes: Of the run.
        tensors: Whether to look for the tensor bytes as well, which takes some twenty runs of each graph.

    Returns:
        ``floor_mib``, the peak before a graph is loaded, and ``phases``, see :class:`PhaseMeasurement`.

    Raises:
        MemoryBudgetError: The plan does not fit the budget, or a tensor does not fit the plan.
    """
    plan = plan_board(artifact.manifest, budget_mib, sizes)
    plan.check()
    runtime()
    context = ssl.create_default_context()
    run = _Run(artifact, plan, sizes)
    reset_peak()
    floor = peak_rss_mib()
    peaks = []
    for phase in plan.phases:
        reset_peak()
        _on_a_thread(lambda phase=phase: run.carry_out(phase))  # type: ignore[misc]
        peaks.append(peak_rss_mib())
    found = []
    for phase, peak in zip(plan.phases, peaks, strict=True):
        need = run.tensor_bytes(phase) if tensors and arena_limit_holds() else None
        memory = phase.memory
        found.append(
            PhaseMeasurement(
                phase.phase,
                memory.micro_batch,
                memory.planned_peak_mib,
                peak,
                memory.arena_bytes / (1 << 20),
                None if need is None else need / (1 << 20),
                memory.feeds_mib,
            )
        )
    del context
    return {
        "model": artifact.manifest.model,
        "onnxruntime": runtime_version(),
        "budget_mib": budget_mib,
        "batch": sizes.batch,
        "floor_mib": floor,
        "peak_mib": max(peaks),
        "planned_peak_mib": plan.peak.memory.planned_peak_mib,
        "phases": [dataclasses.asdict(phase) for phase in found],
    }


def _on_a_thread(work: Callable[[], None]) -> None:
    """A device computes on a thread of its own, which has a stack and a heap."""
    errors: list[BaseException] = []

    def body() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 (raised again below)
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def main() -> int:
    """Print the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("artifact", type=Path)
    add("--budget-mib", type=float, required=True)
    add("--threads", type=int, default=1)
    add("--batch", type=int, default=RunSizes().batch)
    add("--samples", type=int, default=RunSizes().samples)
    add("--sparsity", type=float)
    add("--micro-batch", type=int)
    add("--tensors", action="store_true", help="look for the tensor bytes as well")
    options = parser.parse_args()
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    sizes = RunSizes(options.batch, options.samples, options.sparsity, options.threads, options.micro_batch)
    try:
        answer = measure(load_artifact(options.artifact), options.budget_mib, sizes, tensors=options.tensors)
    except (FedzoError, MemoryError) as error:
        error = error if isinstance(error, FedzoError) else MemoryBudgetError(f"no memory left: {error}")
        failure = {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}
        sys.stdout.write(json.dumps({"error": failure}) + "\n")
        return error.exit_code
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
