"""What a run is: the settings that every side needs to compute the same thing, and those of the coordinator alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from .errors import ConfigError
from .perturbation.directions import Family
from .pruning.mask import Fill
from .replay.optimisers import OptimiserConfig
from .replay.schedules import SCHEDULES, Schedule, rate_factor
from .server_side.aggregation_rules import AggregationSettings
from .wire.framing import MAX_AGE

__all__ = [
    "AggregationSettings",
    "Assignment",
    "EstimatorName",
    "Inputs",
    "PruningMethod",
    "RunSettings",
    "SaliencySettings",
    "Schedule",
    "TrainingSettings",
]

Assignment = Literal["shared", "dealt"]
EstimatorName = Literal["stein", "split", "node", "coordinate", "local", "local-node"]
ESTIMATORS: tuple[EstimatorName, ...] = get_args(EstimatorName)
LOCAL_ESTIMATORS: tuple[EstimatorName, ...] = ("local", "local-node")
DEALING_ESTIMATORS: tuple[EstimatorName, ...] = ("stein", "split", "node")
"""Those with directions that can be dealt; coordinates are the same for all."""
Inputs = Literal["gaussian", "data"]
PruningMethod = Literal["diagonal", "ntk-sap", "synflow", "magnitude", "erk", "random"]
MAX_DIRECTIONS = 60_000
MIN_SIGMA, MAX_SIGMA = 1e-8, 10.0
MAX_LOCAL_STEPS = 1_000
MAX_REPEATS = 65_535  # what the streams of a device's noise have room for
MAX_SCALAR = 1e20  # well below the largest coefficient of an update, 2**80


_FIELDS = {
    "pruning": "method",
    "saliency steps": "steps",
    "checked reports": "checked",
    "saliency samples": "samples",
    "saliency shift": "shift",
    "saliency draws": "draws",
    "saliency inputs": "inputs",
    "deadline": "deadline_s",
    "enrol deadline": "enrol_deadline_s",
}
"""Fields that messages call by another name than their own."""


def _check(ok: bool, name: str, value: object, want: str, hint: str = "") -> None:
    if not ok:
        setting = _FIELDS.get(name, name.replace(" ", "_"))
        raise ConfigError(f"{name} is {value!r}, it must be {want}", hint=hint, setting=setting)


@dataclass(frozen=True, slots=True)
class SaliencySettings:
    """Which weights a run keeps.

    Attributes:
        method: ``diagonal``: every weight's part of the kernel's trace, from the devices' forward passes. ``ntk-sap``:
            its derivative (arXiv 2304.02840, Eq. 7), from the same passes. The server alone makes the masks of
            ``synflow`` (arXiv 2006.05467, by forward passes), ``magnitude``, ``erk`` (arXiv 1911.11134) and ``random``.
        steps: Scoring rounds, or iterations of ``synflow``; after step t of T the density is ``density ** (t / T)``. 0
            for the method's own number: 100 for ``synflow``, else 1.
        floor: Least survivors of a layer, as far as it has that many.
        samples: Inputs that every device scores on.
        shift: Size of the constant shift of a unit's pre-activation.
        draws: Whole-layer weight perturbations per layer that calibrate the layer totals; 0 for none.
        inputs: ``gaussian`` (data-free, seeded) or ``data`` (the device's own training samples).
        checked: Reports a round on Gaussian inputs that the server computes again; devices are drawn when there are
            more. 0 for none.
        check_limit: Relative difference above which such a report does not count.
    """

    method: PruningMethod = "diagonal"
    steps: int = 0
    floor: int = 1
    samples: int = 64
    shift: float = 1e-2
    draws: int = 0
    inputs: Inputs = "gaussian"
    checked: int = 8
    check_limit: float = 5e-3

    def __post_init__(self) -> None:
        methods = get_args(PruningMethod)
        _check(self.method in methods, "pruning", self.method, f"one of {', '.join(methods)}")
        _check(0 <= self.steps <= 1000, "saliency steps", self.steps, "0 to 1000")
        _check(1 <= self.floor <= 1 << 28, "floor", self.floor, "1 or more: a layer would collapse")
        _check(0 <= self.checked <= 100_000, "checked reports", self.checked, "0 to 100000")
        _check(1e-6 <= self.check_limit <= 1.0, "check limit", self.check_limit, "1e-6 to 1")
        _check(1 <= self.samples <= 1 << 16, "saliency samples", self.samples, "1 to 65536")
        _check(0 < self.shift < 10, "saliency shift", self.shift, "above 0 and below 10")
        _check(0 <= self.draws <= 1024, "saliency draws", self.draws, "0 to 1024")
        _check(self.inputs in ("gaussian", "data"), "saliency inputs", self.inputs, "gaussian or data")
        _check(self.method == "diagonal" or not self.draws, "saliency draws", self.draws, "0 unless for diagonal")

    @property
    def is_federated(self) -> bool:
        """Whether devices score; else the server makes the mask."""
        return self.method in ("diagonal", "ntk-sap")

    @property
    def n_steps(self) -> int:
        """Masks one after another."""
        return self.steps or (100 if self.method == "synflow" else 1)

    def sparsity_after(self, step: int, sparsity: float) -> float:
        """Sparsity of the mask of step ``1 <= step <= n_steps`` on the way to ``sparsity``."""
        return float(1.0 - (1.0 - sparsity) ** (step / self.n_steps))


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """Zeroth-order training.

    Attributes:
        rounds: Updates to make.
        estimator: ``stein``: directions over all weights (BAFFLE, arXiv 2301.12195). ``split``: some over the layers in
            front of the artifact's cut, many over those behind it, from stored features. ``node``: directions over the
            first layers, and a sketch of the others' gradient by node perturbation. ``coordinate``: one weight at a
            time (DeepZero, arXiv 2310.02025), exact and for few survivors.
            ``local``: a sketch of each stage's gradient of a loss of its own, in closed form from forward passes, which
            is **not** zeroth-order. ``local-node``: the same by node perturbation, zeroth-order in each stage.
        directions: Family of the perturbations.
        assignment: ``shared``: every device evaluates the same directions; ``dealt``: disjoint ones.
        k: Directions, or coordinates of ``coordinate``, per device and round; of the front layers for ``split`` and
            ``node``.
        tail_k: Directions, or coordinates of the sketch, per device and round for the layers behind; of all sketches
            together for ``local`` and ``local-node``.
        repeats: Passes with fresh noise of ``node`` and ``local-node``.
        feedback: How much of what a sketch could not carry counts in the next round.
        sigma: Length scale of a perturbation; rounded to float32.
        two_sided: Central instead of forward differences.
        batch: Samples behind one loss.
        probe_batch: Samples of the batch behind a direction of the front layers of ``split`` and ``node``, where more
            directions say more than more samples do; other directions have others of the batch. 0 for all.
        local_steps: Steps that a device makes on weights of its own in a round, each with a fresh batch and an equal
            part of the round's directions (DeComFL, arXiv 2405.15861).
        local_rate: Learning rate of these steps, plain descent; above 0 where there are several.
        optimiser: Server optimiser, replayed on every device.
        learning_rate: Peak learning rate.
        schedule: How the rate changes over the rounds, see ``replay/schedules.py``; ``range`` makes the run a range
            test.
        warmup: Updates in front of the first one at the peak rate.
        decay_every: Updates between two steps of the schedule ``step``.
        decay_factor: What each of them multiplies the rate with.
        final_rate: Rate at the end of ``cosine`` and ``linear``, at least of ``step``, and at the beginning of
            ``range``, relative to the peak.
        k_max: Where above ``k``, the most directions that the server may ask for in place of ``k``, as the reports
            agree, see ``server_side/adaptation.py``; 0 for always ``k``.
        adapt_sigma: Whether the server chooses sigma for each round, starting from ``sigma``.
        k_min: Least directions of a slow device, which gets half of ``k``, a quarter and so on by its measured speed,
            see ``server_side/pace.py``; 0 for as many as the others.
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
    probe_batch: int = 0
    local_steps: int = 1
    local_rate: float = 0.0
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    learning_rate: float = 1e-2
    schedule: Schedule = "cosine"
    warmup: int = 0
    decay_every: int = 100
    decay_factor: float = 0.5
    final_rate: float = 0.0
    k_max: int = 0
    adapt_sigma: bool = False
    k_min: int = 0

    def __post_init__(self) -> None:
        _check(0 <= self.rounds <= 1 << 30, "rounds", self.rounds, "0 to 2^30")
        _check(self.directions in ("gaussian", "rademacher", "hadamard"), "directions", self.directions, "a family")
        _check(self.assignment in ("shared", "dealt"), "assignment", self.assignment, "shared or dealt")
        _check(self.estimator in ESTIMATORS, "estimator", self.estimator, f"one of {', '.join(ESTIMATORS)}")
        _check(1 <= self.k <= MAX_DIRECTIONS, "k", self.k, f"1 to {MAX_DIRECTIONS}")
        _check(1 <= self.tail_k <= MAX_DIRECTIONS, "tail k", self.tail_k, f"1 to {MAX_DIRECTIONS}")
        _check(1 <= self.repeats <= MAX_REPEATS, "repeats", self.repeats, f"1 to {MAX_REPEATS}")
        _check(0.0 <= self.feedback < 1.0, "feedback", self.feedback, "at least 0 and below 1")
        _check(MIN_SIGMA < self.sigma < MAX_SIGMA, "sigma", self.sigma, f"above {MIN_SIGMA} and below {MAX_SIGMA}")
        object.__setattr__(self, "sigma", float(np.float32(self.sigma)))  # both sides multiply in float32
        _check(1 <= self.batch <= 1 << 16, "batch", self.batch, "1 to 65536")
        _check(0 <= self.probe_batch <= self.batch, "probe batch", self.probe_batch, f"0 to the batch, {self.batch}")
        self._check_local_steps()
        self._check_pace()
        _check(0 < self.learning_rate < 1e3, "learning rate", self.learning_rate, "above 0 and below 1000")
        _check(self.schedule in SCHEDULES, "schedule", self.schedule, f"one of {', '.join(SCHEDULES)}")
        _check(0 <= self.warmup <= 1 << 30, "warmup", self.warmup, "0 to 2^30")
        _check(1 <= self.decay_every <= 1 << 30, "decay every", self.decay_every, "1 to 2^30")
        _check(0.0 < self.decay_factor <= 1.0, "decay factor", self.decay_factor, "above 0, at most 1")
        _check(0.0 <= self.final_rate <= 1.0, "final rate", self.final_rate, "0 to 1, relative to the peak")
        most = f"0, or k ({self.k}) to {MAX_DIRECTIONS}"
        _check(self.k_max == 0 or self.k <= self.k_max <= MAX_DIRECTIONS, "k max", self.k_max, most)
        if (self.k_max or self.adapt_sigma) and self.estimator not in DEALING_ESTIMATORS:
            what = "k" if self.k_max else "sigma"
            raise ConfigError(
                f"the estimator {self.estimator} has no directions that {what} could adapt to",
                hint="leave --k-max and --adapt-sigma away, or use --estimator stein, split or node",
            )

    def _check_pace(self) -> None:
        _check(0 <= self.k_min <= self.k, "k min", self.k_min, f"0 to k, {self.k}")
        if self.k_min and (self.assignment != "dealt" or self.estimator not in DEALING_ESTIMATORS):
            raise ConfigError(
                "only of dealt directions a slow device can have fewer than others",
                hint="--k-min 0, or --assign dealt with --estimator stein, split or node",
            )
        if self.k_min and self.local_steps > 1:
            raise ConfigError(
                f"the directions of a slow device are halved, but {self.local_steps} local steps need equal parts",
                hint="--k-min 0, or --local-steps 1",
            )

    @property
    def keeps_residual(self) -> bool:
        """Whether a device keeps what its sketches have not carried yet."""
        return self.estimator == "node" or self.estimator in LOCAL_ESTIMATORS

    def _check_local_steps(self) -> None:
        steps, rate = self.local_steps, self.local_rate
        _check(1 <= steps <= MAX_LOCAL_STEPS, "local steps", steps, f"1 to {MAX_LOCAL_STEPS}")
        _check(0 <= rate < 1e3, "local rate", rate, "0 to 1000")
        _check(steps == 1 or rate > 0, "local rate", rate, f"above 0 for {steps} local steps")
        each = f"a multiple of local steps, {steps}: every step takes an equal part"
        _check(self.estimator in LOCAL_ESTIMATORS or self.k % steps == 0, "k", self.k, each)
        _check(self.estimator != "split" or self.tail_k % steps == 0, "tail k", self.tail_k, each)

    def rate(self, step: int) -> float:
        """Learning rate of update ``step``, a float32 value; computed by the server only and sent."""
        factor = rate_factor(
            self.schedule,
            step,
            self.rounds,
            warmup=self.warmup,
            decay_every=self.decay_every,
            decay_factor=self.decay_factor,
            final=self.final_rate,
        )
        return float(np.float32(self.learning_rate * factor))


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Everything that decides a run.

    Attributes:
        seed: Run seed of directions, batches and Gaussian inputs.
        sparsity: Fraction of maskable weights that the mask removes; 0 skips the saliency.
        fill: What removed weights are: ``zero``, or ``init`` for their initial values, which makes a sparse update of
            a dense network.
        saliency: Scoring.
        training: Training.
        aggregation: How the reports of a round become one.
        devices: Devices to wait for before the first round.
        participants: Devices that a round asks, drawn anew for each from those that are ready; 0 for all of them.
        quorum: Reports that a round needs; 0 for 4, or as many as the rule needs, or all where a round asks fewer.
        close_at: Usable reports that close a round of scoring or training at once, without a wait for the others it
            asked; 0 to wait for all that may still come.
        staleness: Updates that a report of training may be late by and still count, see ``server_side/staleness.py``.
        staleness_power: A report that is late by ``a`` updates is scaled by ``(1 + a) ** -staleness_power``; 0 to count
            it like the others.
        snapshots: Whether a device that is far behind may get the weights themselves where they are fewer bytes than
            the scalars that it misses, see ``server_side/catch_up.py``.
        deadline_s: Time that a round may take.
        enrol_deadline_s: Time to wait for ``devices``; then ``quorum`` devices are enough.
        patience: Deadlines without quorum in a row after which the run stops (and can be resumed).
        evaluate_every: Updates between evaluations; 0 evaluates at the end only.
        scalar_limit: A report with a larger absolute value is refused.
        tune_rounds: Updates of a range test, a run of its own before this one that finds its learning rate, see
            ``server_side/rate_finder.py``; 0 for the learning rate that is set.
    """

    seed: int = 1
    sparsity: float = 0.8
    fill: Fill = "zero"
    saliency: SaliencySettings = field(default_factory=SaliencySettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    aggregation: AggregationSettings = field(default_factory=AggregationSettings)
    devices: int = 8
    participants: int = 0
    quorum: int = 0
    close_at: int = 0
    staleness: int = 0
    staleness_power: float = 0.5
    snapshots: bool = False
    deadline_s: float = 60.0
    enrol_deadline_s: float = 300.0
    patience: int = 10
    evaluate_every: int = 100
    scalar_limit: float = 1e6
    tune_rounds: int = 0

    def __post_init__(self) -> None:
        _check(0 <= self.seed < 1 << 64, "seed", self.seed, "an unsigned 64-bit number")
        _check(0.0 <= self.sparsity < 1.0, "sparsity", self.sparsity, "at least 0 and below 1")
        _check(self.fill in ("zero", "init"), "fill", self.fill, "zero or init")
        if self.fill == "init" and self.sparsity == 0.0:
            raise ConfigError(
                "nothing is removed at a sparsity of 0, so there is nothing to fill with initial values",
                hint="--sparsity 0.8 or another one above 0, or leave --fill away",
            )
        _check(1 <= self.devices <= 100_000, "devices", self.devices, "1 to 100000")
        _check(
            0 <= self.participants <= self.devices,
            "participants",
            self.participants,
            f"0 to the number of devices, {self.devices}",
            f"--per-round {self.devices} or less, or --devices {self.participants}" if self.participants > 0 else "",
        )
        most = self.participants or self.devices
        if self.quorum == 0:
            object.__setattr__(self, "quorum", min(most, max(4, self.aggregation.least_reports)))
        want = f"1 to the number of devices that a round asks, {most}"
        _check(1 <= self.quorum <= most, "quorum", self.quorum, want, f"--quorum {min(max(1, self.quorum), most)}")
        _check(
            self.close_at == 0 or self.quorum <= self.close_at <= most,
            "close at",
            self.close_at,
            f"0, or the quorum ({self.quorum}) to the number of devices that a round asks, {most}",
            f"--close-at {min(max(self.close_at, self.quorum), most)}"
            + (f", or --quorum {self.close_at}" if 0 < self.close_at < self.quorum else ""),
        )
        _check(0.01 <= self.deadline_s <= 1e7, "deadline", self.deadline_s, "0.01 s or more")
        _check(0.01 <= self.enrol_deadline_s <= 1e7, "enrol deadline", self.enrol_deadline_s, "0.01 s or more")
        _check(1 <= self.patience <= 1_000_000, "patience", self.patience, "1 or more")
        _check(0 <= self.evaluate_every <= 1 << 30, "evaluate every", self.evaluate_every, "0 or more")
        least = "0, or 20 to 100000"
        _check(self.tune_rounds == 0 or 20 <= self.tune_rounds <= 100_000, "tune rounds", self.tune_rounds, least)
        _check(0 < self.scalar_limit <= MAX_SCALAR, "scalar limit", self.scalar_limit, f"above 0, at most {MAX_SCALAR}")
        self._check_aggregation()
        self._check_staleness()
        if self.training.k_min and self.aggregation.clip != "none":
            raise ConfigError("devices with fewer directions than others cannot be clipped", hint="leave --clip away")

    def _check_staleness(self) -> None:
        most, power = f"0 to {MAX_AGE} updates", self.staleness_power
        _check(0 <= self.staleness <= MAX_AGE, "staleness", self.staleness, most)
        _check(0.0 <= power <= 10.0, "staleness power", power, "0 to 10")
        if self.staleness and not self.aggregation.is_plain:
            raise ConfigError(
                "late reports cannot be compared with others, as their directions are of another round",
                hint="--staleness 0, or --rule mean without --clip",
            )
        if self.staleness and self.training.k_max:
            raise ConfigError(
                "the directions of a round are adapted to what its reports agree on, late ones tell nothing about it",
                hint="--staleness 0, or --k-max 0",
            )

    def _check_aggregation(self) -> None:
        rule, training = self.aggregation, self.training
        if rule.compares and training.assignment == "dealt" and training.estimator in DEALING_ESTIMATORS:
            raise ConfigError(
                f"the rule {rule.rule} compares devices, but dealt directions are others for each",
                hint="--assign shared, or --rule mean with --clip norm",
            )
        if self.quorum < rule.least_reports:
            raise ConfigError(
                f"the rule {rule.rule} needs {rule.least_reports} reports against {rule.hostile} hostile devices, the "
                f"quorum is {self.quorum}",
                hint=f"--quorum {rule.least_reports} or more, or a smaller --hostile",
            )
