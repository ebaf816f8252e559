"""The phases of a run, carried out in this process as a device does, for what they need; see :mod:`.measure`."""

from __future__ import annotations

import dataclasses
import os
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ...protocol.artifact.layout import initial_weights
from ...protocol.artifact.manifest import golden_batch
from ...protocol.errors import FedzoError, SelfTestError
from ...protocol.perturbation.blocks import Deal, blocks_of, deal
from ...protocol.pruning.mask import Fill, Mask, threshold
from ...protocol.pruning.saliency import gaussian_inputs
from ...protocol.replay.optimisers import OptimiserConfig
from ...protocol.replay.update import Replica
from ...protocol.settings import TrainingSettings
from .. import join as _join
from ..datasets.data import Batch
from ..estimation.block_estimators import BlockEstimator, ProbeRequest, make_estimator
from ..inference.engine import Engine, LayoutChoice
from ..inference.ort import arena_limit_holds, runtime_version, sessions_kept
from ..storage.artifact import Artifact
from .board_plan import BoardPlan, PhasePlan, RunSizes, plan_board
from .calibration import calibrate, predicted_query_s
from .memory import peak_rss_mib, reset_peak
from .resident import release_code, trim_heap

if TYPE_CHECKING:
    from .peaks import Watch

__all__ = ["PhaseMeasurement", "measure"]

_POSITIONS: Final = 2
_UPDATES: Final = 2
_RESOLUTION_BYTES: Final = 8 << 10
_TIMED_QUERIES: Final = 5
_imported = _join  # the client and the state machine are in a device's memory as well


@dataclasses.dataclass(frozen=True, slots=True)
class PhaseMeasurement:
    """One phase, planned and measured.

    Attributes:
        phase: ``scoring`` or ``training``.
        micro_batch: Samples of one run.
        planned_mib: What the plan says for the process.
        measured_mib: Peak of the process in this phase.
        planned_anonymous_mib: What the plan says for everything but resident code.
        anonymous_mib: Its peak in this phase.
        code_mib: Peak of the resident code.
        planned_tensors_mib: Limit of ONNX Runtime's tensors, which is enforced.
        tensors_mib: What they need; None if not asked for, or if this ONNX Runtime enforces no limit.
        feeds_mib: Arrays of this package as planned.
        query_s: Median time of a loss of the batch; None while weights are scored.
        keeps_graphs: Whether all graphs of the phase stay loaded.
    """

    phase: str
    micro_batch: int
    planned_mib: float
    measured_mib: float
    planned_anonymous_mib: float
    anonymous_mib: float
    code_mib: float
    planned_tensors_mib: float
    tensors_mib: float | None
    feeds_mib: float
    query_s: float | None
    keeps_graphs: bool


class _Run:
    """One run on one machine, from the dense weights to an evaluation."""

    def __init__(self, artifact: Artifact, plan: BoardPlan, sizes: RunSizes, mask: Mask) -> None:
        self.artifact, self.plan, self.sizes = artifact, plan, sizes
        self.masks = {"scoring": Mask.dense(artifact.manifest.layout), "training": mask}
        self.layout: LayoutChoice = "auto" if any(v.machine != "any" for v in sizes.variants) else "portable"
        # Few directions, since each takes the memory of the one before; of a sketch as many coordinates as in a run.
        self.training = TrainingSettings(estimator=sizes.estimator, batch=sizes.batch, k=_POSITIONS)
        self.checked = False
        self.query_s = 0.0

    def engine(self, phase: PhasePlan, arena_bytes: int) -> Engine:
        """An engine with the portable graphs, which run on every board, or with the variant that was planned."""
        return Engine(
            self.artifact,
            self.masks[phase.phase],
            threads=self.sizes.threads,
            micro_batch=phase.memory.micro_batch,
            arena_bytes=arena_bytes,
            layout=self.layout if phase.phase == "training" else "portable",
            queries="auto" if any(variant.queries > 1 for variant in self.sizes.variants) else 1,
        )

    def carry_out(self, phase: PhasePlan) -> None:
        """Do what a device does in a phase.

        Raises:
            MemoryBudgetError: A tensor does not fit under the plan's limit.
        """
        manifest, mask = self.artifact.manifest, self.masks[phase.phase]
        replica = self._replica(mask)
        with self.engine(phase, phase.memory.arena_bytes) as engine:
            if not self.checked:
                engine.check_golden()
                self.checked = True
            engine.check_variant()
            if phase.phase == "scoring":
                score(engine, replica.weights.copy(), gaussian_inputs(manifest, 1, 0, 0, self.sizes.samples))
                # The mask arrives, and the state machine makes the sparse replica, before the engine is told.
                mask = self.masks["training"]
                following = self._replica(Mask.decode(mask.encode(), manifest.layout, mask.fill))
                del following
                return
            with sessions_kept() if phase.memory.keeps_graphs else nullcontext():
                self.query_s = train(engine, replica, self._estimator(replica), self.sizes.batch)

    def _replica(self, mask: Mask) -> Replica:
        manifest = self.artifact.manifest
        blocks = blocks_of(self.training, manifest, mask)
        return Replica(manifest.layout, mask, manifest.seed, 1, blocks, OptimiserConfig("adam"))

    def _estimator(self, replica: Replica) -> BlockEstimator:
        """As in the agent: directions of its own for the thread that computes."""
        return make_estimator(self.training, replica.blocks, 1)

    def tensor_bytes(self, phase: PhasePlan) -> int:
        """The smallest limit of the arena under which every graph of the phase runs."""
        manifest, mask = self.artifact.manifest, self.masks[phase.phase]
        replica = self._replica(mask)
        weights, estimator = replica.weights, self._estimator(replica)
        count = min(phase.memory.micro_batch, self.sizes.batch if phase.phase == "training" else self.sizes.samples)
        x, y = golden_batch(manifest.input_shape, manifest.n_classes, 1, count)
        calls: list[Callable[[Engine], object]]
        if phase.phase == "scoring":
            shift = np.zeros(manifest.n_units, np.float32)
            calls = [lambda e: e.moments(weights, x), lambda e: e.shifted_logits(weights, x, shift)]
        else:
            request = _request(replica, Batch(x, y))
            calls = [
                lambda e: estimator.probe(e, request),
                lambda e: e.loss(weights, x, y),
                lambda e: e.logits(weights, x),
            ]
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


def train(engine: Engine, replica: Replica, estimator: BlockEstimator, batch: int) -> float:
    """Probes, updates and an evaluation of one batch.

    Returns:
        Median seconds of one loss of the batch.
    """
    manifest = engine.artifact.manifest
    samples = Batch(*golden_batch(manifest.input_shape, manifest.n_classes, 1, batch))
    for update in range(_UPDATES):
        before = estimator.state()  # a device holds it until its report is on the disk
        request = _request(replica, samples)
        estimator.probe(engine, request)
        after = estimator.state()
        counts = [len(positions) for positions in request.positions]
        segments = tuple(
            (one.block.offset + one.first, count) for one, count in zip(_deals(replica), counts, strict=True)
        )
        replica.prepare(update, update, 2.0**-10, segments, np.full(sum(counts), 0.5, np.float32))
        del before, after
    seconds = []
    for _ in range(_TIMED_QUERIES):
        started = time.perf_counter()
        engine.loss(replica.weights, samples.x, samples.y)
        seconds.append(time.perf_counter() - started)
    engine.evaluate(replica.weights, samples.x, samples.y)
    return statistics.median(seconds)


def _deals(replica: Replica) -> tuple[Deal, ...]:
    """The positions of the next round, for the only device."""
    return deal(replica.blocks, "shared", replica.index, 1)


def _request(replica: Replica, batch: Batch) -> ProbeRequest:
    positions = tuple(
        replica.coordinates(one.block.number, one.k) if one.block.kind == "sketch" else one.positions(0)
        for one in _deals(replica)
    )
    return ProbeRequest(replica.weights.copy(), batch, replica.index, 0, positions)


def removed_by_magnitude(artifact: Artifact, sparsity: float, fill: Fill = "zero") -> Mask:
    """A mask as the server would send it, made in a child process: a device only decodes one."""
    layout = artifact.manifest.layout
    if sparsity == 0:
        return Mask.dense(layout)
    source, target = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            scores = np.abs(initial_weights(layout, artifact.manifest.seed))
            with os.fdopen(target, "wb") as pipe:
                pipe.write(threshold(layout, scores, sparsity).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(target)
    with os.fdopen(source, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise SelfTestError(f"the child process that makes the mask ended with status {status}")
    return Mask.decode(data, layout, fill)


def measure(
    artifact: Artifact, budget_mib: float, sizes: RunSizes, watch: Watch, *, tensors: bool = False
) -> dict[str, Any]:
    """Carry out every phase in this process.

    Args:
        artifact: The model.
        budget_mib: For the plan.
        sizes: Of the run.
        watch: Of this process.
        tensors: Whether to look for the tensor bytes as well, which takes some twenty runs of each graph.

    Returns:
        ``start_mib``, the peak until the first phase, and ``start_code_mib`` of code; ``floor_mib``, what is resident
        then; ``peak_mib``, the highest peak since the process began; and ``phases``, see
        :class:`PhaseMeasurement`. ``predicted_query_s`` is what the query should take on this machine.

    Raises:
        MemoryBudgetError: The plan does not fit the budget, or a tensor does not fit the plan.
    """
    plan = plan_board(artifact.manifest, budget_mib, sizes)
    plan.check()
    sparsity = artifact.manifest.sparsity if sizes.sparsity is None else sizes.sparsity
    run = _Run(artifact, plan, sizes, removed_by_magnitude(artifact, sparsity, sizes.fill))
    release_code()
    trim_heap()
    start, found_until_now = peak_rss_mib(), watch.restart()
    reset_peak()
    floor = peak_rss_mib()
    peaks = []
    for phase in plan.phases:
        reset_peak()
        watch.restart()
        _on_a_thread(lambda phase=phase: run.carry_out(phase))  # type: ignore[misc]
        peaks.append((peak_rss_mib(), watch.restart()))
    found = []
    for phase, (peak, kinds) in zip(plan.phases, peaks, strict=True):
        need = run.tensor_bytes(phase) if tensors and arena_limit_holds() else None
        memory = phase.memory
        found.append(
            PhaseMeasurement(
                phase.phase,
                memory.micro_batch,
                memory.planned_peak_mib,
                peak,
                memory.anonymous_mib,
                kinds.anonymous_mib,
                kinds.file_mib,
                memory.arena_bytes / (1 << 20),
                None if need is None else need / (1 << 20),
                memory.feeds_mib,
                run.query_s if phase.phase == "training" else None,
                memory.keeps_graphs,
            )
        )
    return {
        "model": artifact.manifest.model,
        "onnxruntime": runtime_version(),
        "budget_mib": budget_mib,
        "batch": sizes.batch,
        "start_mib": start,
        "start_code_mib": found_until_now.file_mib,
        "floor_mib": floor,
        "peak_mib": max(start, *(peak for peak, _ in peaks)),
        "planned_peak_mib": plan.peak.memory.planned_peak_mib,
        "predicted_query_s": _predicted(run),
        "phases": [dataclasses.asdict(phase) for phase in found],
    }


def _predicted(run: _Run) -> float | None:
    """Seconds of a query with the portable graph, from what this machine does now; None for older artifacts."""
    work, memory = run.artifact.manifest.work, run.plan.phases[-1].memory
    if work is None:
        return None
    sizes = run.sizes
    return predicted_query_s(
        work, calibrate(), batch=sizes.batch, micro_batch=memory.micro_batch, threads=sizes.threads
    )


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
