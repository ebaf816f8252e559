"""How the learning rate changes over the updates of a run, as a factor of the peak rate.

The server computes the rate and sends it in the record, so nobody else needs cosines.

============  =======================================================================================
schedule      factor after the warm-up, with ``p`` from 0 to 1 over the updates that are left
============  =======================================================================================
``constant``  1
``cosine``    ``f + (1 - f) (1 + cos(pi p)) / 2`` (Loshchilov and Hutter, SGDR, ICLR 2017, without restarts)
``linear``    ``f + (1 - f) (1 - p)``
``step``      ``decay_factor`` once more every ``decay_every`` updates, at least ``f``
``range``     grows exponentially from ``f`` to 1: a range test, see ``server_side/rate_finder.py``
============  =======================================================================================

``f`` is the final rate. The warm-up grows linearly up to the peak (Goyal et al., arXiv 1706.02677, section 2.2).
"""

from __future__ import annotations

import math
from typing import Final, Literal, get_args

__all__ = ["SCHEDULES", "Schedule", "rate_factor"]

Schedule = Literal["constant", "cosine", "linear", "step", "range"]
SCHEDULES: Final[tuple[Schedule, ...]] = get_args(Schedule)
SMALLEST: Final = 1e-6


def rate_factor(
    schedule: Schedule,
    step: int,
    rounds: int,
    *,
    warmup: int = 0,
    decay_every: int = 1,
    decay_factor: float = 1.0,
    final: float = 0.0,
) -> float:
    """The factor of update ``step``, from 0 on; at least :data:`SMALLEST`.

    Args:
        schedule: Its form.
        step: The update.
        rounds: Updates of the run.
        warmup: Updates in front of the first one at the peak rate.
        decay_every: Updates between two steps of ``step``.
        decay_factor: What such a step multiplies with.
        final: The factor at the end, or at the beginning for ``range``.
    """
    if step < warmup:
        return max(SMALLEST, (step + 1) / (warmup + 1))
    done = min(1.0, (step - warmup) / max(1, rounds - warmup))
    factor = 1.0
    if schedule == "cosine":
        factor = final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done))
    elif schedule == "linear":
        factor = final + (1.0 - final) * (1.0 - done)
    elif schedule == "step":
        factor = max(final, decay_factor ** ((step - warmup) // decay_every))
    elif schedule == "range":
        factor = max(SMALLEST, final) ** (1.0 - done)
    return max(SMALLEST, factor)
