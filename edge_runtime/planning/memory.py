"""How much memory a device needs, before it loads anything, and how much it used.

The plan adds what was measured to what can be computed:

========  =====================================================================================================
process   Python, numpy, ONNX Runtime, the MQTT client and this package at work, without their code. Measured.
code      What of their code is resident at the peak. Measured; it depends on the kernel and its page cache.
session   Structures of one loaded graph. Measured. At most one is loaded at a time, but for ``node`` with several
          noisy stages, which counts the others itself (:func:`further_session_bytes`), and for ``kept``.
feeds     Weights, indices, one batch, the state of optimiser and directions, the data set if it is in memory.
live      Largest set of tensors alive at once (manifest), the copies of weights and indices that the graph splits
          off, and the workspace of further threads.
margin    What the arena loses to fragmentation, and to older releases of ONNX Runtime.
kept      Graphs that stay loaded between rounds, each with an arena of its own, see :mod:`..inference.kept_graphs`.
========  =====================================================================================================

The limit of the arena (:attr:`MemoryPlan.arena_bytes`) makes ONNX Runtime fail cleanly instead of growing over the
plan. Peaks are read as ``VmHWM``: ``ru_maxrss`` never falls and is inherited over fork and exec.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...protocol.artifact.graph_files import GraphVariant
from ...protocol.artifact.manifest import Manifest
from ...protocol.errors import ConfigError, MemoryBudgetError
from ..inference.weight_feeds import fed_bytes

__all__ = [
    "PROCESS_FLOOR_MIB",
    "SCORING_GRAPHS",
    "TLS_MIB",
    "TRAINING_GRAPHS",
    "MemoryPlan",
    "arena_bytes_of",
    "available_mib",
    "further_session_bytes",
    "peak_rss_mib",
    "plan",
    "reset_peak",
    "tls_bytes",
    "total_mib",
    "variant_bytes",
]

SCORING_GRAPHS: Final = ("moments.onnx", "saliency.onnx")
TRAINING_GRAPHS: Final = ("probe.onnx", "predict.onnx")

PROCESS_MIB: Final = 31.4
"""Anonymous memory of a device at work without a graph, a batch and weights: interpreter, modules, ONNX Runtime's
operators, threads, connection, state. x86-64, Python 3.11.7, numpy 2.4.6, onnxruntime 1.32.0, paho-mqtt 2.2.0, set up
by :mod:`.resident`. No board was measured; 1.19.2 needs less."""

TLS_MIB: Final = 2.5
"""OpenSSL and a context with the system's certificates, where the URL asks for it."""

LOADING_CODE_MIB: Final = 18.2
RUNNING_CODE_MIB: Final = 15.5
"""Library code that is resident while a graph is loaded, and while it runs, by 64 KiB around each page that is needed:
measured with libraries that came into the page cache as after a start of the machine. Where a kernel keeps a file in
larger pieces, as Linux 6.18 does on ext4 for one that was just installed, up to 13 MiB more are resident until it is
read anew; they are clean pages, which the kernel takes back before anything else."""

PROCESS_FLOOR_MIB: Final = PROCESS_MIB + LOADING_CODE_MIB

SESSION_MIB: Final = 1.0
"""A loaded graph without tensors and code; it grows with the graph, see :data:`SESSION_BYTES_PER_GRAPH_BYTE`."""

SESSION_BYTES_PER_GRAPH_BYTE: Final = 30
WORKING_BYTES_PER_THREAD: Final = 64 << 10
"""What a convolution takes for each thread after the first; the manifest counts one."""

FRAGMENTATION: Final = 0.05
"""Arena needed over live bytes: at most 1.02 times with onnxruntime 1.32.0 for LeNet-5, ResNet-8 and ResNet-20, batches
of 16 to 64."""

UNFOLDED_SAMPLES: Final = 6
"""Older releases unfold a whole sample for a convolution: 1.23.2 needs up to 1.1 MiB more for ResNet-20, that is 5.5
times its tensors per sample. 1.32.0 unfolds piece by piece."""

ARENA_SLACK_BYTES: Final = 320 << 10
"""For batches of 1 to 8, where small tensors count: at most 194 KiB over live bytes with 1.32.0."""

_LARGEST_MICRO_BATCH = 32
_MIB = float(1 << 20)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Planned peak of a device process, in MiB.

    Attributes:
        process_mib: Process without a graph and code.
        session_mib: The loaded graph, without tensors and code.
        feeds_mib: Arrays of this package: weights, batch, optimiser, data set.
        live_mib: Tensors of ONNX Runtime.
        margin_mib: What the arena may take over ``live_mib``.
        micro_batch: Samples of one run of a graph.
        budget_mib: What the profile allows.
        code_mib: Resident code of libraries.
        kept_mib: Graphs that stay loaded beside the one that runs; 0 if one is loaded at a time.
    """

    process_mib: float
    session_mib: float
    feeds_mib: float
    live_mib: float
    margin_mib: float
    micro_batch: int
    budget_mib: float
    code_mib: float = 0.0
    kept_mib: float = 0.0

    @property
    def anonymous_mib(self) -> float:
        """Sum of all parts but the code: what does not depend on the kernel and its page cache."""
        return self.process_mib + self.session_mib + self.feeds_mib + self.live_mib + self.margin_mib + self.kept_mib

    @property
    def keeps_graphs(self) -> bool:
        """Whether all graphs of the phase stay loaded."""
        return self.kept_mib > 0.0

    @property
    def planned_peak_mib(self) -> float:
        """Sum of all parts."""
        return self.anonymous_mib + self.code_mib

    @property
    def fits(self) -> bool:
        """Whether the sum is within the budget."""
        return self.planned_peak_mib <= self.budget_mib

    @property
    def arena_bytes(self) -> int:
        """Limit for :class:`~..inference.engine.Engine`."""
        return math.ceil((self.live_mib + self.margin_mib) * _MIB)


def plan(
    manifest: Manifest,
    n_survivors: int,
    budget_mib: float,
    *,
    graphs: Sequence[str],
    batch: int,
    micro_batch: int | None = None,
    threads: int = 1,
    dataset_bytes: int = 0,
    n_fed: int | None = None,
) -> MemoryPlan:
    """Choose the micro-batch and plan the peak of one phase.

    The largest micro-batch that fits is chosen, out of ``batch`` (when at most 32), 32, 16, 8, 4, 2 and 1: beyond 32
    samples nothing gets faster, below 4 each sample costs more.

    Args:
        manifest: Of the artifact.
        n_survivors: Length of the weights in this phase; ``manifest.layout.size`` before there is a mask.
        budget_mib: What the process may use.
        graphs: Graphs of the phase, such as :data:`SCORING_GRAPHS` or :data:`TRAINING_GRAPHS`, and the variants that
            the machine may run in their place; one is loaded at a time. With ``probe.onnx`` the state of optimiser
            and directions is counted.
        batch: Samples held at once.
        micro_batch: Fixed by the user; ``None`` to choose.
        threads: Threads within an operator.
        dataset_bytes: Resident samples, see :attr:`~..datasets.data.Dataset.resident_bytes`.
        n_fed: Weights that the graphs read where removed ones are not 0; None where they read survivors.

    Raises:
        MemoryBudgetError: Not even one sample a run fits, or the fixed micro-batch does not.
        ConfigError: A number is out of range.
    """
    if batch < 1 or threads < 1 or (micro_batch is not None and micro_batch < 1) or not budget_mib > 0:
        raise ConfigError(
            f"batch ({batch}), threads ({threads}), micro_batch ({micro_batch}) and the budget ({budget_mib} MiB)"
            " must be above 0"
        )
    powers = [32, 16, 8, 4, 2, 1]
    candidates = sorted({size for size in (batch, *powers) if size <= min(batch, _LARGEST_MICRO_BATCH)}, reverse=True)
    plans = {
        size: _planned(manifest, (n_survivors, n_fed), budget_mib, graphs, batch, size, threads, dataset_bytes)
        for size in (*candidates, *([] if micro_batch is None else [micro_batch]))
    }
    fitting = [size for size in candidates if plans[size].fits]
    if micro_batch is None:
        if fitting:
            return plans[fitting[0]]
        wanted = plans[1]
    elif plans[micro_batch].fits:
        return plans[micro_batch]
    else:
        wanted = plans[micro_batch]
    if fitting:
        hint = f"--micro-batch {fitting[0]} fits"
    else:
        hint = (
            f"use a board with {math.ceil(plans[1].planned_peak_mib)} MiB for fedzo, a smaller --batch than {batch},"
            " a higher sparsity or a smaller model"
        )
        if dataset_bytes:
            hint += "; data in an uncompressed .npz or .npy stay on the disk"
    raise MemoryBudgetError(
        f"{manifest.model} needs {wanted.planned_peak_mib:.1f} MiB with {n_survivors} weights and micro-batch"
        f" {wanted.micro_batch}, the budget is {budget_mib:g} MiB",
        hint=hint,
    )


def _planned(
    manifest: Manifest,
    sizes: tuple[int, int | None],
    budget_mib: float,
    graphs: Sequence[str],
    batch: int,
    micro_batch: int,
    threads: int,
    dataset_bytes: int,
) -> MemoryPlan:
    n_survivors, n_fed = sizes
    tensors, spare = _arena(manifest, graphs, n_fed or n_survivors, min(micro_batch, batch), threads)
    variants = [variant for variant in manifest.variants if variant.file.name in graphs]
    feeds = _batch_bytes(manifest, batch)
    if variants:
        feeds += max(variant_bytes(variant, n_survivors, n_fed) for variant in variants)
    if "probe.onnx" in graphs:
        feeds += _training_state_bytes(n_survivors)
    else:
        # The weights of the task are a copy; then a mask arrives, and the sparse replica is made beside the dense one.
        feeds += 8 * n_survivors
    # The known answer is computed before all that, on the dense initial weights.
    feeds += max(0, math.ceil(_golden_bytes(manifest, micro_batch, threads) - feeds - tensors - spare))
    # The engine's weights and indices, and the caller's weights.
    feeds += fed_bytes(n_survivors, n_fed) + 4 * n_survivors
    feeds += 4 * manifest.n_units + 24 * manifest.n_moments + dataset_bytes
    # While a graph is loaded there is more code and there are no tensors.
    code_mib = max(RUNNING_CODE_MIB, LOADING_CODE_MIB - (tensors + spare) / _MIB)
    return MemoryPlan(
        process_mib=PROCESS_MIB,
        code_mib=code_mib,
        session_mib=max(_session_bytes(manifest, name) for name in graphs) / _MIB,
        feeds_mib=feeds / _MIB,
        live_mib=tensors / _MIB,
        margin_mib=spare / _MIB,
        micro_batch=micro_batch,
        budget_mib=budget_mib,
    )


def variant_bytes(variant: GraphVariant, n_survivors: int, n_fed: int | None) -> int:
    """Weight tensors of a variant, the place of each survivor there, and the weights of several queries."""
    filling = 12 * (n_fed or 0)  # places and values, while the tensors are made
    return variant.weight_bytes + variant.queries * ((8 if variant.queries == 1 else 12) * n_survivors + filling)


def _batch_bytes(manifest: Manifest, batch: int) -> int:
    """A batch as float32, as much again for parts of it that are copied, labels and logits."""
    return batch * (8 * math.prod(manifest.input_shape) + 8 + 8 * manifest.n_classes)


def _golden_bytes(manifest: Manifest, micro_batch: int, threads: int) -> float:
    """What the known answer takes: dense weights, those of an engine of its own, its indices, its batch and tensors."""
    size, batch = manifest.layout.size, manifest.golden.batch
    tensors, spare = _arena(manifest, ("probe.onnx",), size, min(micro_batch, batch), threads)
    return 12 * size + _batch_bytes(manifest, batch) + tensors + spare


def arena_bytes_of(manifest: Manifest, graphs: Sequence[str], n_survivors: int, micro_batch: int, threads: int) -> int:
    """Limit of the arena under which ``graphs`` run, one at a time, as :func:`plan` computes it.

    Raises:
        ArtifactError: The artifact has no memory plan for one of ``graphs``.
    """
    tensors, spare = _arena(manifest, graphs, n_survivors, micro_batch, threads)
    return math.ceil(tensors + spare)


def further_session_bytes(manifest: Manifest, name: str, batch: int) -> int:
    """What a graph takes that is loaded beside the one that the plan counts: its structures, and its own arena.

    Args:
        manifest: Of the artifact.
        name: File name of the graph.
        batch: Samples held at once; the micro-batch is at most that, and not known yet.
    """
    live = manifest.live_bytes(name, min(batch, _LARGEST_MICRO_BATCH))
    return math.ceil(_session_bytes(manifest, name) + (1.0 + FRAGMENTATION) * live + ARENA_SLACK_BYTES)


def _session_bytes(manifest: Manifest, name: str) -> int:
    """Structures of a loaded graph, or variant of one, without tensors and code."""
    files = [*manifest.graphs, *(variant.file for variant in manifest.variants)]
    size = next(file.size for file in files if file.name == name)
    return math.ceil(SESSION_MIB * _MIB + SESSION_BYTES_PER_GRAPH_BYTE * size)


def _arena(
    manifest: Manifest, graphs: Sequence[str], n_survivors: int, micro_batch: int, threads: int
) -> tuple[int, float]:
    """Bytes of the tensors, and what the arena may take over them."""
    variants = {variant.file.name for variant in manifest.variants}
    live = max(manifest.live_bytes(name, micro_batch) for name in graphs)
    # The parts into which the weights and indices are split; the inputs of a variant are tensors already.
    with_parts = max(
        manifest.live_bytes(name, micro_batch) + (0 if name in variants else 8 * n_survivors) for name in graphs
    )
    per_sample = max(slope for memory in manifest.memory if memory.name in graphs for _, slope in memory.envelope)
    tensors = with_parts + WORKING_BYTES_PER_THREAD * (threads - 1)
    return tensors, FRAGMENTATION * live + UNFOLDED_SAMPLES * per_sample + ARENA_SLACK_BYTES


def _training_state_bytes(n_survivors: int) -> int:
    """Optimiser state (2 arrays), copies to undo an update (3), signs, directions, gradient: 11 arrays; and for
    Hadamard directions the permutation of all padded rows, whose making takes 20 bytes a row for a moment.

    The ranking of a sketch takes the place of signs and rows: 8 bytes a weight, and 21 more while it chooses.
    """
    padded = 1 << max(0, n_survivors - 1).bit_length()
    return 44 * n_survivors + 20 * padded


def tls_bytes() -> int:
    """What TLS takes in this process: nothing until something has loaded it."""
    return int(TLS_MIB * _MIB) if "ssl" in sys.modules else 0


def peak_rss_mib() -> float:
    """Peak resident memory of this process since its start or :func:`reset_peak`, in MiB (``VmHWM``).

    Returns:
        0.0 where the system has no ``/proc``.
    """
    return _status_mib("VmHWM") or 0.0


def reset_peak() -> bool:
    """Let the peak start again from the current resident memory.

    Returns:
        Whether the system did it; without ``/proc``, or after a change of user, it cannot.
    """
    try:
        descriptor = os.open("/proc/self/clear_refs", os.O_WRONLY)
    except OSError:
        return False
    try:
        os.write(descriptor, b"5")
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def total_mib() -> float:
    """Memory that this process could get, in MiB: the machine's, or a limit of a container.

    That is the limit at the root of ``/sys/fs/cgroup``, where a container sees its own control group. The limit of a
    service's group, such as systemd's ``MemoryMax``, is not looked for: the unit names the budget as well.

    Returns:
        0.0 where the system does not tell.
    """
    total = _meminfo_mib("MemTotal")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limit = int(Path(path).read_text()) / _MIB
            total = min(total, limit) if total else limit
    return total


def available_mib() -> float:
    """Memory that new allocations can get without swapping, in MiB (``MemAvailable``); 0.0 if unknown."""
    return _meminfo_mib("MemAvailable")


def _status_mib(key: str) -> float:
    return _field_mib("/proc/self/status", key)


def _meminfo_mib(key: str) -> float:
    return _field_mib("/proc/meminfo", key)


def _field_mib(path: str, key: str) -> float:
    with contextlib.suppress(OSError, ValueError, IndexError), Path(path).open(encoding="ascii") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name == key:
                return int(value.split()[0]) / 1024
    return 0.0
