"""How long a query takes: a few rates of a machine, and the work of the graph.

A query is one loss of a batch with the portable ``probe.onnx``. Its time is modelled as the sum of

* multiply-accumulates over the rate at which they are done,
* bytes that operators read and write over the bandwidth of memory, and
* a fixed cost of each operator, for each run and again for each sample, since ONNX Runtime computes convolutions
  sample by sample.

The constants were fitted to LeNet-5 and ResNet-20 on one x86-64 server core, whose rates :func:`calibrate` measures. At
batches of 1, 8 and 32 the prediction is within 16 % of the median there, and within 15 % for two networks that they
were not fitted to, ResNet-8 and ResNet-20 on smaller images. For a board the rates come out of its profile: the clock,
what a core does in a cycle, and a published copy benchmark. No board was timed, so the error there is not known: take
the figure for the order of magnitude, and to compare boards and batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from ...protocol.artifact.graph_work import GraphWork

if TYPE_CHECKING:
    from ...hardware_profiles import Profile

__all__ = ["Rates", "board_rates", "calibrate", "predicted_query_s"]

COMPUTE_SHARE: Final = 0.461
"""Rate of the layers of these networks over that of a large matrix product; fitted."""
OPERATOR_SAMPLE_S: Final = 1.14e-6
OPERATOR_RUN_S: Final = 1.5e-6
"""Of an operator for each sample and for each run, at :data:`REFERENCE_MHZ`; fitted."""
REFERENCE_MHZ: Final = 3000

PEAK_SHARE: Final = 0.7
"""Rate of a large matrix product over what a core could do in theory; assumed for boards."""
UNKNOWN_COPY_MB_S: Final = 1000
"""For a board without a published figure: less than any profile has."""

_SQUARE: Final = 384
_COPIED_FLOATS: Final = 4 << 20
_REPEATS: Final = 9


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        multiply_accumulates_per_s: ``float32``, of one core, in a large matrix product.
        copy_bytes_per_s: Bytes copied by one core; each is read and written.
        operator_scale: How much slower than the reference an operator starts.
        is_copy_assumed: The copy rate is a stand-in.
    """

    multiply_accumulates_per_s: float
    copy_bytes_per_s: float
    operator_scale: float = 1.0
    is_copy_assumed: bool = False


def predicted_query_s(work: GraphWork, rates: Rates, *, batch: int, micro_batch: int, threads: int = 1) -> float:
    """Seconds of one loss of ``batch`` samples, ``micro_batch`` at a time.

    Threads are taken to share the multiply-accumulates without loss, and nothing else.
    """
    runs = math.ceil(batch / micro_batch)
    compute = work.sample_multiply_accumulates * batch / (rates.multiply_accumulates_per_s * COMPUTE_SHARE * threads)
    moved = (work.sample_bytes * batch + work.run_bytes * runs) / (2 * rates.copy_bytes_per_s)
    started = work.operators * (OPERATOR_SAMPLE_S * batch + OPERATOR_RUN_S * runs) * rates.operator_scale
    return compute + moved + started


def board_rates(profile: Profile) -> Rates | None:
    """Rates of a board as its profile gives them; None if it does not say what a core does in a cycle."""
    if profile.macs_per_cycle is None:
        return None
    hertz = 1e6 * profile.clock_mhz
    copy_mb_s = profile.memcpy_mb_s
    return Rates(
        hertz * profile.macs_per_cycle * PEAK_SHARE,
        1e6 * (copy_mb_s or UNKNOWN_COPY_MB_S),
        REFERENCE_MHZ / profile.clock_mhz,
        copy_mb_s is None,
    )


def calibrate() -> Rates:
    """Measure this machine, in about 0.1 s; numpy must not use threads (``OPENBLAS_NUM_THREADS=1``)."""
    square = np.full((_SQUARE, _SQUARE), 0.5, np.float32)
    product = np.empty_like(square)
    block = np.ones(_COPIED_FLOATS, np.float32)
    copy = np.ones_like(block)
    products_s = _fastest(lambda: np.matmul(square, square, out=product))
    copy_s = _fastest(lambda: np.copyto(copy, block))
    return Rates(_SQUARE**3 / products_s, block.nbytes / copy_s)


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some repeats: what disturbs only makes it slower."""
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
