"""What a run needs of this board: a memory plan for every phase, and the optional graphs that are worth fetching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ...protocol.artifact.graph_files import GraphFile
from ...protocol.artifact.manifest import Manifest
from ...protocol.device_side.run_files import needed_graphs
from ...protocol.perturbation.blocks import blocks_of, sketch_k
from ...protocol.pruning.mask import Mask
from ...protocol.replay.update import largest_snapshot
from ...protocol.settings import RunSettings
from ..datasets.data import Dataset
from ..estimation.block_estimators import estimator_bytes
from ..inference.kept_graphs import with_kept_graphs
from ..inference.providers import CPU
from ..inference.variants import wanted_variants
from .memory import SCORING_GRAPHS, MemoryPlan, plan, tls_bytes
from .variant_plan import best_plan

__all__ = ["Limits", "past_rounds_bytes", "plan_run", "plan_with_variants"]

_PAST_ROUND_BYTES: Final = 512
"""Objects around the coordinates of one round."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the board allows.

    Attributes:
        ram_budget_mib: Planned peak of the whole process.
        threads: Threads within an operator.
        micro_batch: Samples of one run of a graph; None to choose.
        providers: Execution providers in order of preference.
        strict_providers: Refuse a run when the first one does not start.
        fence: Bound the memory of the process by the plan, see :class:`~.fence.Fence`. Not for an accelerator, whose
            drivers map more than there is.
    """

    ram_budget_mib: float
    threads: int = 1
    micro_batch: int | None = None
    providers: tuple[str, ...] = (CPU,)
    strict_providers: bool = False
    fence: bool = False


def plan_run(
    manifest: Manifest, settings: RunSettings, dataset: Dataset, limits: Limits, micro_batch: int | None
) -> tuple[tuple[MemoryPlan, ...], tuple[GraphFile, ...]]:
    """The plans of a run's phases, training first, and the files of the variants that they count.

    Graphs stay loaded between the rounds of training where the budget has room for that, see
    :mod:`..inference.kept_graphs`.

    Args:
        manifest: Of the artifact.
        settings: Of the run.
        dataset: The device's samples.
        limits: What the board allows.
        micro_batch: Fixed, or None to choose.

    Raises:
        MemoryBudgetError: A phase does not fit.
        ArtifactError: The artifact lacks a graph that the estimator needs.
    """
    layout, training = manifest.layout, settings.training

    def phase(graphs: tuple[str, ...], n_survivors: int, batch: int, resident_bytes: int) -> MemoryPlan:
        return plan(
            manifest,
            n_survivors,
            limits.ram_budget_mib,
            graphs=graphs,
            batch=batch,
            micro_batch=micro_batch,
            threads=limits.threads,
            dataset_bytes=resident_bytes,
            n_fed=layout.size if settings.fill == "init" else None,
            n_following=survivors,
        )

    survivors = layout.size - round(settings.sparsity * layout.maskable_size)
    resident = dataset.resident_bytes + tls_bytes()
    graphs = tuple(graph.name for graph in needed_graphs(manifest, settings) if graph.name not in SCORING_GRAPHS)
    own = estimator_bytes(training, manifest, survivors)
    earlier = past_rounds_bytes(settings, manifest)
    own += earlier
    if settings.snapshots:  # as its blocks come, and once more when it is whole
        own += 2 * (largest_snapshot(training.optimiser, survivors) + earlier)
    planned, files = plan_with_variants(
        manifest, lambda variants: phase((*graphs, *variants), survivors, training.batch, resident + own)
    )
    if training.estimator != "stein":  # that one changes graphs at an evaluation only
        names, n_fed = (*graphs, *(file.name for file in files)), layout.size if settings.fill == "init" else None
        planned = with_kept_graphs(planned, manifest, names, survivors, n_fed=n_fed, threads=limits.threads)
    plans = [planned]
    if settings.sparsity > 0 and settings.saliency.is_federated:
        plans.append(phase(SCORING_GRAPHS, layout.size, settings.saliency.samples, resident))
    return tuple(plans), files


def past_rounds_bytes(settings: RunSettings, manifest: Manifest) -> int:
    """What a replica remembers of the rounds whose late scalars may still count: the coordinates of every sketch.

    Raises:
        ConfigError: The artifact lacks what the estimator needs.
    """
    if not settings.staleness or settings.training.estimator in ("stein", "split"):
        return 0
    # A block of a sparse network has fewer weights, so not more coordinates.
    blocks = blocks_of(settings.training, manifest, Mask.dense(manifest.layout))
    most = sum(sketch_k(block, len(blocks), 1 + settings.staleness) for block in blocks if block.kind == "sketch")
    return settings.staleness * (8 * most + _PAST_ROUND_BYTES)


def plan_with_variants(
    manifest: Manifest, phase: Callable[[tuple[str, ...]], MemoryPlan]
) -> tuple[MemoryPlan, tuple[GraphFile, ...]]:
    """The plan with the variants of this machine, unless they need more than the budget or smaller micro-batches.

    Args:
        manifest: Lists the variants.
        phase: Plans with variants of these names besides the portable graphs.

    Returns:
        The plan, and the files of the variants that it counts: all, or only the one for single queries. The engine
        takes one if it is there, fits under the plan's limit and gives the known answer.
    """
    planned, variants = best_plan(wanted_variants(manifest), phase)
    return planned, tuple(variant.file for variant in variants)
