"""Whether a phase's memory plan has room for variants of its graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Final

from ...protocol.artifact.graph_files import GraphVariant
from ...protocol.errors import MemoryBudgetError
from .memory import MemoryPlan

__all__ = ["best_plan"]

_GOOD_MICRO_BATCH: Final = 8  # smaller ones cost more than a variant saves


def best_plan(
    wanted: tuple[GraphVariant, ...], phase: Callable[[tuple[str, ...]], MemoryPlan]
) -> tuple[MemoryPlan, tuple[GraphVariant, ...]]:
    """The plan with ``wanted``, unless they need more than the budget or smaller micro-batches.

    Args:
        wanted: What the machine would take.
        phase: Plans with variants of these names besides the portable graphs.

    Returns:
        The plan, and the variants that it counts: all, or only the one for single queries, or none.

    Raises:
        MemoryBudgetError: Even the portable graphs do not fit.
    """
    portable = phase(())
    for variants in (wanted, tuple(v for v in wanted if v.queries == 1)):
        if not variants:
            continue
        with contextlib.suppress(MemoryBudgetError):
            planned = phase(tuple(v.file.name for v in variants))
            if planned.micro_batch >= min(portable.micro_batch, _GOOD_MICRO_BATCH):
                return planned, variants
    return portable, ()
