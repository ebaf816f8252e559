"""What a run is: the settings that every side needs to compute the same thing, and those of the coordinator alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .directions import Family
from .errors import ConfigError
from .optimisers import OptimiserConfig

__all__ = ["Assignment", "EstimatorName", "Inputs", "RunSettings", "SaliencySettings", "Schedule", "TrainingSettings"]

Assignment = Literal["shared", "dealt"]
Schedule = Literal["constant", "cosine"]
EstimatorName = Literal["stein", "split", "node"]
Inputs = Literal["gaussian", "data"]
MAX_DIRECTIONS = 60_000
MAX_REPEATS = 65_535  # what the streams of a device's noise have room for
MAX_SCALAR = 1e20  # well below the largest coefficient of an update, 2**80


def _check(ok: bool, name: str, value: object, want: str) -> None:
    if not ok:
        raise ConfigError(f"{name} is {value!r}, it must be {want}")


@dataclass(frozen=True, slots=True)
class SaliencySettings:
    """Forward-only diagonal NTK scores (arXiv 2304.02840, Eq. 7, with unit shifts in place of autograd).

    Attributes:
        steps: Scoring rounds; after step t of T the density is ``density ** (t / T)``.
        samples: Inputs that every device scores on.
        shift: Size of the constant shift of a unit's pre-activation.
        draws: Whole-layer weight perturbations per layer that calibrate the layer totals; 0 for none.
        inputs: ``gaussian`` (data-free, seeded) or ``data`` (the device's own training samples).
    """

    steps: int = 1
    samples: int = 64
    shift: float = 1e-2
    draws: int = 0
    inputs: Inputs = "gaussian"

    def __post_init__(self) -> None:
        _check(1 <= self.steps <= 1000, "saliency steps", self.steps, "1 to 1000")
        _check(1 <= self.samples <= 1 << 16, "saliency samples", self.samples, "1 to 65536")
        _check(0 < self.shift < 10, "saliency shift", self.shift, "above 0 and below 10")
        _check(0 <= self.draws <= 1024, "saliency draws", self.draws, "0 to 1024")
        _check(self.inputs in ("gaussian", "data"), "saliency inputs", self.inputs, "gaussian or data")


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """Zeroth-order training.

    Attributes:
        rounds: Updates to make.
        estimator: ``stein``: directions over all weights (BAFFLE, arXiv 2301.12195). ``split``: some over the layers in
            front of the artifact's cut, many over those behind it, from stored features. ``node``: directions over the
            layers in front of the fully connected ones, and a sketch of these layers' gradient by node perturbation.
        directions: Family of the perturbations.
        assignment: ``shared``: every device evaluates the same directions; ``dealt``: disjoint ones.
        k: Directions per device and round; of the front layers unless the estimator is ``stein``.
        tail_k: Directions, or rows of the sketch, per device and round for the layers behind the cut.
        repeats: Passes with fresh noise of ``node``.
        feedback: How much of what a sketch could not carry counts in the next round, for ``node``.
        sigma: Length scale of a perturbation; rounded to float32.
        two_sided: Central instead of forward differences.
        batch: Samples behind one loss.
        optimiser: Server optimiser, replayed on every device.
        learning_rate: Peak learning rate.
        schedule: How the rate falls over the rounds.
    """

    rounds: int = 500
    estimator: EstimatorName = "stein"
    directions: Family = "hadamard"
    assignment: Assignment = "dealt"
    k: int = 64
    tail_k: int = 256
    repeats: int = 16
    feedback: float = 0.95
    sigma: float = 1e-3
    two_sided: bool = False
    batch: int = 16
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    learning_rate: float = 1e-2
    schedule: Schedule = "cosine"

    def __post_init__(self) -> None:
        _check(0 <= self.rounds <= 1 << 30, "rounds", self.rounds, "0 to 2^30")
        _check(self.directions in ("gaussian", "rademacher", "hadamard"), "directions", self.directions, "a family")
        _check(self.assignment in ("shared", "dealt"), "assignment", self.assignment, "shared or dealt")
        _check(self.estimator in ("stein", "split", "node"), "estimator", self.estimator, "stein, split or node")
        _check(1 <= self.k <= MAX_DIRECTIONS, "k", self.k, f"1 to {MAX_DIRECTIONS}")
        _check(1 <= self.tail_k <= MAX_DIRECTIONS, "tail k", self.tail_k, f"1 to {MAX_DIRECTIONS}")
        _check(1 <= self.repeats <= MAX_REPEATS, "repeats", self.repeats, f"1 to {MAX_REPEATS}")
        _check(0.0 <= self.feedback < 1.0, "feedback", self.feedback, "at least 0 and below 1")
        _check(math.isfinite(self.sigma) and 1e-8 < self.sigma < 10, "sigma", self.sigma, "above 1e-8 and below 10")
        object.__setattr__(self, "sigma", float(np.float32(self.sigma)))  # both sides multiply in float32
        _check(1 <= self.batch <= 1 << 16, "batch", self.batch, "1 to 65536")
        _check(0 < self.learning_rate < 1e3, "learning rate", self.learning_rate, "above 0 and below 1000")
        _check(self.schedule in ("constant", "cosine"), "schedule", self.schedule, "constant or cosine")

    def rate(self, step: int) -> float:
        """Learning rate of update ``step``, a float32 value; computed by the server only and sent."""
        factor = 1.0
        if self.schedule == "cosine":
            factor = 0.5 * (1.0 + math.cos(math.pi * step / max(1, self.rounds)))
        return float(np.float32(max(self.learning_rate * factor, 1e-6 * self.learning_rate)))


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Everything that decides a run.

    Attributes:
        seed: Run seed of directions, batches and Gaussian inputs.
        sparsity: Fraction of maskable weights that the mask removes; 0 skips the saliency.
        saliency: Scoring.
        training: Training.
        devices: Devices to wait for before the first round.
        participants: Devices that a round asks, drawn anew for each from those that are ready; 0 for all of them.
        quorum: Reports that a round needs.
        deadline_s: Time that a round may take.
        enrol_deadline_s: Time to wait for ``devices``; then ``quorum`` devices are enough.
        patience: Deadlines without quorum in a row after which the run stops (and can be resumed).
        evaluate_every: Updates between evaluations; 0 evaluates at the end only.
        scalar_limit: A report with a larger absolute value is refused.
    """

    seed: int = 1
    sparsity: float = 0.8
    saliency: SaliencySettings = field(default_factory=SaliencySettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    devices: int = 8
    participants: int = 0
    quorum: int = 4
    deadline_s: float = 60.0
    enrol_deadline_s: float = 300.0
    patience: int = 10
    evaluate_every: int = 100
    scalar_limit: float = 1e6

    def __post_init__(self) -> None:
        _check(0 <= self.seed < 1 << 64, "seed", self.seed, "an unsigned 64-bit number")
        _check(0.0 <= self.sparsity < 1.0, "sparsity", self.sparsity, "at least 0 and below 1")
        _check(1 <= self.devices <= 100_000, "devices", self.devices, "1 to 100000")
        _check(
            0 <= self.participants <= self.devices,
            "participants",
            self.participants,
            f"0 to the number of devices, {self.devices}",
        )
        most = self.participants or self.devices
        _check(1 <= self.quorum <= most, "quorum", self.quorum, f"1 to the number of devices that a round asks, {most}")
        _check(0.01 <= self.deadline_s <= 1e7, "deadline", self.deadline_s, "0.01 s or more")
        _check(0.01 <= self.enrol_deadline_s <= 1e7, "enrol deadline", self.enrol_deadline_s, "0.01 s or more")
        _check(1 <= self.patience <= 1_000_000, "patience", self.patience, "1 or more")
        _check(0 <= self.evaluate_every <= 1 << 30, "evaluate every", self.evaluate_every, "0 or more")
        _check(0 < self.scalar_limit <= MAX_SCALAR, "scalar limit", self.scalar_limit, f"above 0, at most {MAX_SCALAR}")
