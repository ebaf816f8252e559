"""What a run would need on a board, phase by phase, from the artifact's manifest alone."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Final, Literal

from ...protocol.artifact.manifest import GraphVariant, Manifest
from ...protocol.device_side.run_files import needed_graphs
from ...protocol.errors import MemoryBudgetError
from ...protocol.pruning.mask import Fill
from ...protocol.settings import EstimatorName, PruningMethod, RunSettings, SaliencySettings, TrainingSettings
from ..estimation.block_estimators import estimator_bytes
from ..inference.kept_graphs import with_kept_graphs
from .memory import SCORING_GRAPHS, MemoryPlan, plan
from .variant_plan import best_plan

__all__ = ["BoardPlan", "Phase", "PhasePlan", "RunSizes", "plan_board"]

Phase = Literal["scoring", "training"]
_NO_LIMIT_MIB: Final = 1e9


@dataclass(frozen=True, slots=True)
class RunSizes:
    """The settings of a run that decide its memory; by default those of `fedzo serve`.

    Attributes:
        batch: Samples behind one loss.
        samples: Inputs that are scored.
        sparsity: Fraction of the maskable weights that is removed; the artifact's when None. At 0 nothing is scored.
        threads: Threads within an operator.
        micro_batch: Samples of one run of a graph; None to choose.
        dataset_bytes: Resident samples.
        variants: Of ``probe.onnx``, what the machine that is planned for would take where it fits, as
            :func:`~..inference.variants.wanted_variants` gives them.
        fill: What removed weights are: with ``init`` the graphs read all weights, as many as there are.
        pruning: The method; where the server alone makes the mask, boards score nothing.
        estimator: Of training; it decides which graphs are loaded, and whether they stay.
    """

    batch: int = RunSettings().training.batch
    samples: int = RunSettings().saliency.samples
    sparsity: float | None = None
    threads: int = 1
    micro_batch: int | None = None
    dataset_bytes: int = 0
    variants: tuple[GraphVariant, ...] = ()
    fill: Fill = RunSettings().fill
    pruning: PruningMethod = RunSettings().saliency.method
    estimator: EstimatorName = RunSettings().training.estimator


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """One phase.

    Attributes:
        phase: ``scoring`` or ``training``.
        memory: The plan under the budget; if it does not fit, that of the smallest micro-batch.
        survivors: Length of the weights.
        refusal: Why it does not fit, and its hint; empty if it does.
        hint: What to change.
    """

    phase: Phase
    memory: MemoryPlan
    survivors: int
    refusal: str = ""
    hint: str = ""

    @property
    def slack_mib(self) -> float:
        """What the budget leaves; negative if it does not fit."""
        return self.memory.budget_mib - self.memory.planned_peak_mib


@dataclass(frozen=True, slots=True)
class BoardPlan:
    """Both phases under one budget.

    Attributes:
        budget_mib: What the process may use.
        phases: In the order of a run.
    """

    budget_mib: float
    phases: tuple[PhasePlan, ...]

    @property
    def fits(self) -> bool:
        """Whether every phase does."""
        return all(not phase.refusal for phase in self.phases)

    @property
    def peak(self) -> PhasePlan:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.memory.planned_peak_mib)

    def check(self) -> None:
        """Raise what a device would raise.

        Raises:
            MemoryBudgetError: A phase does not fit.
        """
        for phase in self.phases:
            if phase.refusal:
                raise MemoryBudgetError(f"{phase.phase}: {phase.refusal}", hint=phase.hint)


def plan_board(manifest: Manifest, budget_mib: float, sizes: RunSizes) -> BoardPlan:
    """Plan as a device does when it joins a run over a connection without TLS, which takes :data:`TLS_MIB` more.

    With variants in ``sizes`` their graphs and weights are counted, all or at least the one for single queries, unless
    they need more than the budget or a smaller micro-batch.

    Raises:
        ConfigError: A number is out of range.
        ArtifactError: The artifact lacks a graph that the estimator needs.
    """
    layout = manifest.layout
    sparsity = manifest.sparsity if sizes.sparsity is None else sizes.sparsity
    survivors = layout.size - round(sparsity * layout.maskable_size)
    phases = [_phase("training", manifest, survivors, survivors, budget_mib, sizes)]
    if sparsity > 0 and SaliencySettings(method=sizes.pruning).is_federated:
        phases.insert(0, _phase("scoring", manifest, layout.size, survivors, budget_mib, sizes))
    return BoardPlan(budget_mib, tuple(phases))


def _phase(
    phase: Phase,
    manifest: Manifest,
    n_survivors: int,
    following: int,
    budget_mib: float,
    sizes: RunSizes,
) -> PhasePlan:
    graphs: tuple[str, ...] = SCORING_GRAPHS
    batch, resident_bytes = sizes.batch if phase == "training" else sizes.samples, sizes.dataset_bytes
    n_fed = manifest.layout.size if sizes.fill == "init" else None
    if phase == "training":
        training = TrainingSettings(estimator=sizes.estimator, batch=batch)
        graphs = tuple(file.name for file in needed_graphs(manifest, RunSettings(training=training, sparsity=0.0)))
        resident_bytes += estimator_bytes(training, manifest, n_survivors)

    def under(limit_mib: float, micro_batch: int | None, more: tuple[str, ...] = ()) -> MemoryPlan:
        return plan(
            manifest,
            n_survivors,
            limit_mib,
            graphs=(*graphs, *more),
            batch=batch,
            micro_batch=micro_batch,
            threads=sizes.threads,
            dataset_bytes=resident_bytes,
            n_fed=n_fed,
            n_following=following,
        )

    try:
        wanted = sizes.variants if phase == "training" else ()
        memory, taken = best_plan(wanted, lambda variants: under(budget_mib, sizes.micro_batch, variants))
        if phase == "training" and sizes.estimator != "stein":
            names = (*graphs, *(variant.file.name for variant in taken))
            memory = with_kept_graphs(memory, manifest, names, n_survivors, n_fed=n_fed, threads=sizes.threads)
        return PhasePlan(phase, memory, n_survivors)
    except MemoryBudgetError as error:
        needed = under(_NO_LIMIT_MIB, sizes.micro_batch or 1)
        hint = error.hint
        if phase == "scoring" and "micro-batch" not in hint:
            # Neither the batch nor the sparsity changes this phase.
            smallest = math.ceil(under(_NO_LIMIT_MIB, 1).planned_peak_mib)
            hint = f"use a board with {smallest} MiB for fedzo, fewer samples than {batch} or a smaller model"
        needed = dataclasses.replace(needed, budget_mib=budget_mib)
        return PhasePlan(phase, needed, n_survivors, error.message, hint)
