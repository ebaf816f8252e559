"""What is said about settings before they are used: misspelt variables, and settings that change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from ..protocol.settings import RunSettings
from .config import Resolved, unknown_variables
from .output import Output
from .run_options import OPTIONS

__all__ = ["note_settings"]

_OF_ESTIMATORS: Final = {
    "training.tail_k": ("split", "node", "local", "local-node"),
    "training.repeats": ("node", "local-node"),
    "training.feedback": ("node", "local", "local-node"),
    "training.probe_batch": ("split", "node"),
}
"""Settings that only these estimators look at."""


def note_settings(output: Output, resolved: Resolved[Any], run: RunSettings) -> None:
    """Warn of what somebody set in vain."""
    for note in (*unknown_variables(type(resolved.settings)), *_without_effect(resolved, run)):
        output.warn(note)


def _without_effect(resolved: Resolved[Any], run: RunSettings) -> Iterator[str]:
    training = run.training
    if training.rounds and training.warmup >= training.rounds:
        yield f"--warmup {training.warmup} is not below --rounds {training.rounds}: the rate never reaches its peak"
    needs = {
        **{name: f"--estimator {', '.join(some)}" for name, some in _OF_ESTIMATORS.items()},
        "training.decay_every": "--schedule step",
        "training.decay_factor": "--schedule step",
        "training.local_rate": "--local-steps 2 or more",
        "aggregation.clip_factor": "--clip norm or value",
        "staleness_power": "--staleness 1 or more",
    }
    has_effect = {
        **{name: training.estimator in some for name, some in _OF_ESTIMATORS.items()},
        "training.decay_every": training.schedule == "step",
        "training.decay_factor": training.schedule == "step",
        "training.local_rate": training.local_steps > 1,
        "aggregation.clip_factor": run.aggregation.clip != "none",
        "staleness_power": run.staleness > 0,
    }
    for name, need in needs.items():
        if resolved.origins[name].kind in ("flag", "environment", "file") and not has_effect[name]:
            yield f"{OPTIONS[name]} has no effect without {need}"
