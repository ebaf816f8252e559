"""What a loaded graph takes: its structures, the arena of its tensors, and what its weights need beside that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from ...protocol.artifact.graph_files import GraphMemory, GraphVariant
from ...protocol.artifact.manifest import Manifest

__all__ = [
    "ARENA_INDEX",
    "LARGEST_MICRO_BATCH",
    "arena_bytes_of",
    "arena_of",
    "further_session_bytes",
    "graph_file_bytes",
    "scatter_bytes",
    "session_bytes",
    "variant_bytes",
]

SESSION_MIB: Final = 1.5
"""A loaded graph without tensors and code; it grows with the graph, see :data:`SESSION_BYTES_PER_GRAPH_BYTE`."""

SESSION_BYTES_PER_GRAPH_BYTE: Final = 30

CONSTANT_COPIES: Final = 2
"""Times that the tensors of a file are in memory while it is loaded, besides those that the arena reserves."""

WORKING_BYTES_PER_THREAD: Final = 64 << 10
"""What a convolution takes for each thread after the first; the manifest counts one."""

FRAGMENTATION: Final = 0.02
"""Arena needed over what the manifest says, which is what a replay of the arena needs at any batch, see
:mod:`fedzo.exporter.arena`: at most 0.3 % with onnxruntime 1.32.0, forty networks, batches of 1 to 32."""

UNFOLDED_SAMPLES: Final = 6
"""Older releases unfold a whole sample for a convolution, 1.32.0 does so piece by piece. Where an artifact of an older
version does not say how much that is: 1.23.2 needs up to 1.1 MiB more for ResNet-20, 5.5 times its tensors per sample.
"""

ARENA_SLACK_BYTES: Final = 64 << 10
"""For small batches, where pieces of 256 bytes count."""

ARENA_INDEX: Final = 32
"""The arena notes the owner of every 256 bytes in 8 bytes of its own."""

LARGEST_MICRO_BATCH: Final = 32
"""Beyond that nothing gets faster."""

_MIB = float(1 << 20)


def variant_bytes(variant: GraphVariant, n_survivors: int, n_fed: int | None) -> int:
    """Weight tensors of a variant, the place of each survivor there, and the weights of several queries."""
    filling = 12 * (n_fed or 0)  # places and values, while the tensors are made
    each = (8 if variant.queries == 1 else 12) * n_survivors + filling
    return variant.weight_bytes + variant.queries * each + 4 * max(n_survivors, n_fed or 0)  # and indices meanwhile


def scatter_bytes(manifest: Manifest, n_survivors: int) -> int:
    """``ScatterElements`` makes 8 bytes of each index, for one parameter at a time, and outside of the arena."""
    return 8 * min(n_survivors, max((p.size for p in manifest.layout.parameters if p.maskable), default=0))


def arena_bytes_of(manifest: Manifest, graphs: Sequence[str], n_survivors: int, micro_batch: int, threads: int) -> int:
    """Limit of the arena under which ``graphs`` run, one at a time, as :func:`plan` computes it.

    Raises:
        ArtifactError: The artifact has no memory plan for one of ``graphs``.
    """
    tensors, spare = arena_of(manifest, graphs, n_survivors, micro_batch, threads)
    return math.ceil(tensors + spare)


def further_session_bytes(manifest: Manifest, name: str, batch: int) -> int:
    """What a graph takes that is loaded beside the one that the plan counts: its structures, and its own arena.

    Args:
        manifest: Of the artifact.
        name: File name of the graph.
        batch: Samples held at once; the micro-batch is at most that, and not known yet.
    """
    live = manifest.live_bytes(name, min(batch, LARGEST_MICRO_BATCH))
    arena = (1.0 + FRAGMENTATION) * live + ARENA_SLACK_BYTES
    return math.ceil(session_bytes(manifest, name) + arena * (1.0 + 1.0 / ARENA_INDEX))


def session_bytes(manifest: Manifest, name: str) -> int:
    """Structures of a loaded graph, or variant of one, without tensors and code."""
    structures, constants = graph_file_bytes(manifest, name)
    return math.ceil(SESSION_MIB * _MIB + SESSION_BYTES_PER_GRAPH_BYTE * structures + CONSTANT_COPIES * constants)


def graph_file_bytes(manifest: Manifest, name: str) -> tuple[int, int]:
    """Bytes of a graph's file, or of a variant's, that are no constants, and those that are."""
    files = [*manifest.graphs, *(variant.file for variant in manifest.variants)]
    size = next(file.size for file in files if file.name == name)
    constants = min(size, manifest.memory_of(name).constants)
    return size - constants, constants


def arena_of(
    manifest: Manifest, graphs: Sequence[str], n_survivors: int, micro_batch: int, threads: int
) -> tuple[int, float]:
    """Bytes of the tensors, and what the arena may take over them."""
    variants = {variant.file.name for variant in manifest.variants}
    live = max(manifest.live_bytes(name, micro_batch) for name in graphs)
    # The parts into which the weights and indices are split; the inputs of a variant are tensors already.
    with_parts = max(
        manifest.live_bytes(name, micro_batch) + (0 if name in variants else 8 * n_survivors) for name in graphs
    )
    tensors = with_parts + WORKING_BYTES_PER_THREAD * (threads - 1)
    unfolded = max(_unfolded_bytes(manifest.memory_of(name)) for name in graphs)
    return tensors, FRAGMENTATION * live + unfolded + ARENA_SLACK_BYTES


def _unfolded_bytes(memory: GraphMemory) -> int:
    """What older releases take to unfold one sample; a guess for artifacts of older versions."""
    guess = UNFOLDED_SAMPLES * max(slope for _, slope in memory.envelope)
    return guess if memory.unfolded is None else min(guess, memory.unfolded)
