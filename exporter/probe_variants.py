"""The optional forms of the probe graph that an artifact holds for the machine that exports it, and for all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from .blocked_layout import BLOCK_SIZES, BlockedProbe, block_probe
from .forward import ForwardGraph
from .graphs import ArtifactGraphs
from .query_batches import QUERIES, batch_queries

__all__ = ["VARIANTS", "probe_variants"]

VARIANTS: Final = (
    f"probe.plainq{QUERIES}.onnx",
    *(f"probe.nchwc{block}.onnx" for block in BLOCK_SIZES),
    *(f"probe.nchwc{block}q{QUERIES}.onnx" for block in BLOCK_SIZES),
)
"""Every file name that :func:`probe_variants` may yield."""


def probe_variants(forward: ForwardGraph, built: ArtifactGraphs) -> Iterator[tuple[str, BlockedProbe, int]]:
    """File name, graph and queries in one run of each form that can be made here."""
    blocked = block_probe(built.graphs["probe.onnx"], built.layout)
    if blocked is not None:
        yield f"probe.nchwc{blocked.block}.onnx", blocked, 1
    batched = batch_queries(forward, built.layout)
    if batched is None:
        return
    model, tensors = batched
    yield f"probe.plainq{QUERIES}.onnx", BlockedProbe(model, {}, "any", "any", 0), QUERIES
    blocked = block_probe(model, tensors)
    if blocked is not None:
        yield f"probe.nchwc{blocked.block}q{QUERIES}.onnx", blocked, QUERIES
