"""Graphs that stay loaded between the rounds of a run, where the memory plan has room for all of them.

An estimator with stored features loads several graphs in every round, one after another: a load takes some
milliseconds of processor time, half of a round of a small network. Weights are inputs, so a graph that stays loaded is
as good as a new one, and gives the same bits. What it costs is its structures, and an arena of its own that keeps the
tensors of the largest run. Micro-batches and the limit of an arena are those of the plan without it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Final

from ...protocol.artifact.manifest import Manifest
from ..planning.graph_bytes import ARENA_INDEX, CONSTANT_COPIES, arena_bytes_of, graph_file_bytes, variant_bytes
from ..planning.memory import LOADING_CODE_MIB, MemoryPlan

__all__ = ["with_kept_graphs"]

SESSION_BYTES: Final = 64 << 10
SESSION_BYTES_PER_GRAPH_BYTE: Final = 50
"""Structures of a graph that is loaded beside others, without tensors: less than of the first one, which brings what
all share. LeNet-5 and ResNet-8, onnxruntime 1.32.0: up to 48 bytes for each byte of the graph."""

_MIB = float(1 << 20)


def with_kept_graphs(
    plan: MemoryPlan,
    manifest: Manifest,
    graphs: Sequence[str],
    n_survivors: int,
    *,
    n_fed: int | None = None,
    threads: int = 1,
) -> MemoryPlan:
    """The plan with all graphs of a phase loaded at once; ``plan`` itself if that does not fit its budget.

    Args:
        plan: Of the phase, with one graph loaded at a time.
        manifest: Of the artifact.
        graphs: File names of the graphs that the phase loads, variants included.
        n_survivors: Length of the weights.
        n_fed: Weights that the graphs read where removed ones are not 0; None where they read survivors.
        threads: Threads within an operator.
    """
    read, micro_batch = n_fed or n_survivors, plan.micro_batch
    each = [arena_bytes_of(manifest, (name,), read, micro_batch, threads) for name in graphs]
    arenas = [math.ceil(size * (1.0 + 1.0 / ARENA_INDEX)) for size in each]
    variants = [variant_bytes(v, n_survivors, n_fed) for v in manifest.variants if v.file.name in graphs]
    files = [graph_file_bytes(manifest, name) for name in graphs]
    structures = [
        SESSION_BYTES + SESSION_BYTES_PER_GRAPH_BYTE * own + CONSTANT_COPIES * constants for own, constants in files
    ]
    # The plan counts the largest of each.
    kept = sum(sum(parts) - max(parts, default=0) for parts in (arenas, variants, structures))
    # The last graph is loaded beside the tensors of the others.
    found = dataclasses.replace(plan, kept_mib=kept / _MIB, code_mib=LOADING_CODE_MIB)
    return found if found.fits else plan
