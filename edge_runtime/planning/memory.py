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
from .graph_bytes import (
    ARENA_INDEX,
    LARGEST_MICRO_BATCH,
    arena_bytes_of,
    arena_of,
    further_session_bytes,
    scatter_bytes,
    session_bytes,
    variant_bytes,
)

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
    n_following: int | None = None,
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
        n_following: Survivors of the mask that ends scoring; None for all.

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
    candidates = sorted({size for size in (batch, *powers) if size <= min(batch, LARGEST_MICRO_BATCH)}, reverse=True)
    plans = {
        size: _planned(
            manifest, (n_survivors, n_fed, n_following), budget_mib, graphs, batch, size, threads, dataset_bytes
        )
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
    sizes: tuple[int, int | None, int | None],
    budget_mib: float,
    graphs: Sequence[str],
    batch: int,
    micro_batch: int,
    threads: int,
    dataset_bytes: int,
) -> MemoryPlan:
    n_survivors, n_fed, n_following = sizes
    size, variants = manifest.layout.size, [v for v in manifest.variants if v.file.name in graphs]
    tensors, spare = arena_of(manifest, graphs, n_fed or n_survivors, min(micro_batch, batch), threads)
    # The mask, the replica's weights and moments, and what the engine reads.
    held = size + 12 * n_survivors + fed_bytes(n_survivors, n_fed)
    # The known answer is computed before anything else is there.
    golden = held + _golden_bytes(manifest, variants, micro_batch, threads)
    # The weights of a task are a copy.
    feeds = held + 4 * n_survivors + _batch_bytes(manifest, batch)
    scattered = scatter_bytes(manifest, n_fed or n_survivors)
    if "probe.onnx" in graphs:
        # Indices are scattered while nothing is updated.
        feeds += max((variant_bytes(v, n_survivors, n_fed) for v in variants), default=0)
        feeds += max(scattered, _training_state_bytes(n_survivors) + size)
    else:
        # A mask arrives, and the sparse replica is made out of dense weights beside the dense one.
        feeds += max(scattered, 8 * size + 12 * (size if n_following is None else n_following))
    feeds = max(feeds, math.ceil(golden - tensors - spare))
    feeds += 4 * manifest.n_units + 24 * manifest.n_moments + dataset_bytes
    # While a graph is loaded there is more code and there are no tensors.
    code_mib = max(RUNNING_CODE_MIB, LOADING_CODE_MIB - (tensors + spare) / _MIB)
    return MemoryPlan(
        process_mib=PROCESS_MIB,
        code_mib=code_mib,
        session_mib=(max(session_bytes(manifest, name) for name in graphs) + (tensors + spare) / ARENA_INDEX) / _MIB,
        feeds_mib=feeds / _MIB,
        live_mib=tensors / _MIB,
        margin_mib=spare / _MIB,
        micro_batch=micro_batch,
        budget_mib=budget_mib,
    )


def _batch_bytes(manifest: Manifest, batch: int) -> int:
    """A batch as float32, as much again for parts of it that are copied, labels and logits."""
    return batch * (8 * math.prod(manifest.input_shape) + 8 + 8 * manifest.n_classes)


def _golden_bytes(manifest: Manifest, variants: Sequence[GraphVariant], micro_batch: int, threads: int) -> float:
    """What the known answer takes: a mask, dense weights, those of an engine of its own, its indices, its batch and
    tensors; of the portable graph, and then of a variant.
    """
    size, batch = manifest.layout.size, manifest.golden.batch
    graphs = [("probe.onnx", scatter_bytes(manifest, size))]
    graphs += [(v.file.name, variant_bytes(v, size, None)) for v in variants if v.queries == 1]
    arenas = [(sum(arena_of(manifest, (name,), size, min(micro_batch, batch), threads)), own) for name, own in graphs]
    return 13 * size + _batch_bytes(manifest, batch) + max(arena + own for arena, own in arenas)


def _training_state_bytes(n_survivors: int) -> int:
    """What an update takes beside weights and moments: copies to undo it (3 arrays), the gradient, directions and
    signs of estimator and replica; and for Hadamard directions the permutations of all padded rows, 8 bytes a row, and
    20 for a moment while one is made.

    The ranking of a sketch takes the place of signs and rows: 8 bytes a weight, and 21 more while it chooses.
    """
    padded = 1 << max(0, n_survivors - 1).bit_length()
    return 24 * n_survivors + 28 * padded


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
