"""The options of a run, for every command that starts one: rounds, training, aggregation, pruning."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final

import typer

__all__ = ["OPTIONS", "SETTINGS", "run_options", "with_run_options"]

TUNE_ROUNDS = 60

SETTINGS: Final = {
    "seed": "seed",
    "devices": "devices",
    "per_round": "participants",
    "quorum": "quorum",
    "close_at": "close_at",
    "staleness": "staleness",
    "staleness_power": "staleness_power",
    "snapshots": "snapshots",
    "deadline": "deadline_s",
    "enrol_deadline": "enrol_deadline_s",
    "patience": "patience",
    "evaluate_every": "evaluate_every",
    "rounds": "training.rounds",
    "estimator": "training.estimator",
    "k": "training.k",
    "tail_k": "training.tail_k",
    "repeats": "training.repeats",
    "feedback": "training.feedback",
    "directions": "training.directions",
    "assign": "training.assignment",
    "sigma": "training.sigma",
    "two_sided": "training.two_sided",
    "batch": "training.batch",
    "probe_batch": "training.probe_batch",
    "local_steps": "training.local_steps",
    "local_rate": "training.local_rate",
    "optimiser": "training.optimiser.name",
    "learning_rate": "training.learning_rate",
    "tune_rounds": "tune_rounds",
    "front_rate": "training.optimiser.front_rate",
    "schedule": "training.schedule",
    "warmup": "training.warmup",
    "decay_every": "training.decay_every",
    "decay_factor": "training.decay_factor",
    "final_rate": "training.final_rate",
    "ema": "training.optimiser.ema",
    "k_min": "training.k_min",
    "k_max": "training.k_max",
    "adapt_sigma": "training.adapt_sigma",
    "rule": "aggregation.rule",
    "hostile": "aggregation.hostile",
    "clip": "aggregation.clip",
    "clip_factor": "aggregation.clip_factor",
    "sparsity": "sparsity",
    "fill": "fill",
    "pruning": "saliency.method",
    "floor": "saliency.floor",
    "saliency_steps": "saliency.steps",
    "saliency_samples": "saliency.samples",
    "saliency_draws": "saliency.draws",
    "saliency_inputs": "saliency.inputs",
    "saliency_checked": "saliency.checked",
}
"""What each option sets, by dotted name."""
OPTIONS: Final = {setting: f"--{name.replace('_', '-')}" for name, setting in SETTINGS.items()}
"""What they are called."""

_TRAINING = "Training"
_ROUNDS = "Rounds"
_PRUNING = "Pruning"
_AGGREGATION = "Aggregation"


def run_options(
    *,
    seed: Annotated[int | None, typer.Option(help="Seed of directions and batches.")] = None,
    devices: Annotated[int | None, typer.Option(help="Devices to wait for.", rich_help_panel=_ROUNDS)] = None,
    per_round: Annotated[
        int | None, typer.Option(help="Devices that a round asks; 0: all that are ready.", rich_help_panel=_ROUNDS)
    ] = None,
    quorum: Annotated[
        int | None,
        typer.Option(help="Reports that a round needs; 0: 4, or all of fewer devices.", rich_help_panel=_ROUNDS),
    ] = None,
    close_at: Annotated[
        int | None,
        typer.Option(
            help="Reports that close a round at once, so that it can ask more devices than it needs; 0: wait for all.",
            rich_help_panel=_ROUNDS,
        ),
    ] = None,
    staleness: Annotated[
        int | None,
        typer.Option(help="Updates that a report may be late by and still count; 0: none.", rich_help_panel=_ROUNDS),
    ] = None,
    staleness_power: Annotated[
        float | None,
        typer.Option(help="A report late by A updates is scaled by (1 + A) ** -POWER.", rich_help_panel=_ROUNDS),
    ] = None,
    snapshots: Annotated[
        bool | None,
        typer.Option(
            "--snapshots/--no-snapshots",
            help="Send a device that is far behind the weights themselves where that is fewer bytes than the scalars.",
            rich_help_panel=_ROUNDS,
        ),
    ] = None,
    deadline: Annotated[
        float | None, typer.Option(help="Seconds that a round may take.", rich_help_panel=_ROUNDS)
    ] = None,
    enrol_deadline: Annotated[
        float | None, typer.Option(help="Seconds to wait for --devices.", rich_help_panel=_ROUNDS)
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Deadlines without quorum before the run stops.", rich_help_panel=_ROUNDS)
    ] = None,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Updates between evaluations; 0: at the end.", rich_help_panel=_ROUNDS)
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Updates to make.", rich_help_panel=_TRAINING)] = None,
    estimator: Annotated[
        str | None,
        typer.Option(
            help="stein: directions over all weights; split: many over the layers behind the cut; node: noise on what "
            "the layers yield; coordinate: one weight at a time; local: every stage's gradient of a loss of its own, "
            "in closed form by forward passes, which is not zeroth-order; local-node: that by noise, zeroth-order in "
            "each stage.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    k: Annotated[
        int | None, typer.Option(help="Directions, or single weights, per device and round.", rich_help_panel=_TRAINING)
    ] = None,
    tail_k: Annotated[
        int | None,
        typer.Option(
            help="Scalars for the layers behind the cut (split, node) or in all (local, local-node).",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(help="node, local-node: passes with fresh noise.", rich_help_panel=_TRAINING)
    ] = None,
    feedback: Annotated[
        float | None,
        typer.Option(
            help="All but stein, split, coordinate: part of what was not sent that counts next time.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    directions: Annotated[
        str | None, typer.Option(help="hadamard, rademacher or gaussian.", rich_help_panel=_TRAINING)
    ] = None,
    assign: Annotated[
        str | None,
        typer.Option(help="dealt: disjoint directions; shared: the same ones.", rich_help_panel=_TRAINING),
    ] = None,
    sigma: Annotated[float | None, typer.Option(help="Size of a perturbation.", rich_help_panel=_TRAINING)] = None,
    two_sided: Annotated[
        bool | None, typer.Option("--two-sided/--one-sided", help="Kind of difference.", rich_help_panel=_TRAINING)
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Samples behind one loss.", rich_help_panel=_TRAINING)] = None,
    probe_batch: Annotated[
        int | None,
        typer.Option(
            help="split, node: samples behind a direction of the first layers; 0: the batch.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    local_steps: Annotated[
        int | None,
        typer.Option(help="Steps of a device on its own between two reports.", rich_help_panel=_TRAINING),
    ] = None,
    local_rate: Annotated[
        float | None, typer.Option(help="Learning rate of these steps.", rich_help_panel=_TRAINING)
    ] = None,
    optimiser: Annotated[
        str | None, typer.Option(help="adam, sgd, momentum or sign_momentum.", rich_help_panel=_TRAINING)
    ] = None,
    learning_rate: Annotated[
        str | None,
        typer.Option(
            metavar="RATE", help="Peak rate, or auto: a short run before this one finds it.", rich_help_panel=_TRAINING
        ),
    ] = None,
    tune_rounds: Annotated[
        int | None,
        typer.Option(help=f"Updates of that run [default with auto: {TUNE_ROUNDS}].", rich_help_panel=_TRAINING),
    ] = None,
    front_rate: Annotated[
        float | None,
        typer.Option(help="Rate of the first block of weights, relative to the others.", rich_help_panel=_TRAINING),
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="cosine, constant, linear or step.", rich_help_panel=_TRAINING)
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(help="Updates in front of the first at the peak rate.", rich_help_panel=_TRAINING)
    ] = None,
    decay_every: Annotated[
        int | None, typer.Option(help="step: updates between two falls of the rate.", rich_help_panel=_TRAINING)
    ] = None,
    decay_factor: Annotated[
        float | None, typer.Option(help="step: what each fall multiplies with.", rich_help_panel=_TRAINING)
    ] = None,
    final_rate: Annotated[
        float | None, typer.Option(help="Rate at the end, relative to the peak.", rich_help_panel=_TRAINING)
    ] = None,
    ema: Annotated[
        float | None,
        typer.Option(help="Decay of the average of the weights that is evaluated; 0: none.", rich_help_panel=_TRAINING),
    ] = None,
    k_min: Annotated[
        int | None,
        typer.Option(help="Least directions of a slow board, by its measured speed; 0: --k.", rich_help_panel=_ROUNDS),
    ] = None,
    k_max: Annotated[
        int | None,
        typer.Option(help="Adapt the directions of a round, from --k up to this; 0: no.", rich_help_panel=_TRAINING),
    ] = None,
    adapt_sigma: Annotated[
        bool | None,
        typer.Option(
            "--adapt-sigma/--fixed-sigma", help="Choose sigma anew for every round.", rich_help_panel=_TRAINING
        ),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help="What the reports of a round become: mean, median, trimmed-mean, krum, multi-krum, sign-vote or "
            "centred-clip; all but mean need --assign shared, or estimators that only sketch.",
            rich_help_panel=_AGGREGATION,
        ),
    ] = None,
    hostile: Annotated[
        int | None, typer.Option(help="Hostile devices that a round may have.", rich_help_panel=_AGGREGATION)
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(help="Limit reports (norm), their scalars (value) or none.", rich_help_panel=_AGGREGATION),
    ] = None,
    clip_factor: Annotated[
        float | None,
        typer.Option(
            help="That limit, relative to the median of the devices' root mean squares.", rich_help_panel=_AGGREGATION
        ),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Weights to remove [default: the artifact's].", rich_help_panel=_PRUNING)
    ] = None,
    pruning: Annotated[
        str | None,
        typer.Option(
            help="Scored by devices: diagonal, ntk-sap. By the server alone: synflow, magnitude, erk, random.",
            rich_help_panel=_PRUNING,
        ),
    ] = None,
    fill: Annotated[
        str | None,
        typer.Option(
            help="Removed weights are zero, or keep their initial value: init, a sparse update of a dense network.",
            rich_help_panel=_PRUNING,
        ),
    ] = None,
    floor: Annotated[int | None, typer.Option(help="Least survivors of a layer.", rich_help_panel=_PRUNING)] = None,
    saliency_steps: Annotated[
        int | None,
        typer.Option(help="Scoring rounds, or iterations of synflow; 0: 1, or 100.", rich_help_panel=_PRUNING),
    ] = None,
    saliency_samples: Annotated[
        int | None, typer.Option(help="Inputs scored on, per device.", rich_help_panel=_PRUNING)
    ] = None,
    saliency_draws: Annotated[
        int | None, typer.Option(help="Whole-layer draws per layer; 4 for deep nets.", rich_help_panel=_PRUNING)
    ] = None,
    saliency_inputs: Annotated[
        str | None, typer.Option(help="gaussian (data-free) or data.", rich_help_panel=_PRUNING)
    ] = None,
    saliency_checked: Annotated[
        int | None,
        typer.Option(help="Reports a round that the server computes again; 0: none.", rich_help_panel=_PRUNING),
    ] = None,
) -> None:
    """The options; :data:`SETTINGS` says what each of them sets."""


def _settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The options' values by the dotted name of their setting, as ``resolve`` takes them; None for those not given."""
    values = {setting: arguments[name] for name, setting in SETTINGS.items()}
    return {**values, **_rate(arguments["learning_rate"], arguments["tune_rounds"])}


def _rate(text: str | None, tune_rounds: int | None) -> dict[str, float | int | None]:
    """The learning rate as settings."""
    if text == "auto":
        return {"training.learning_rate": None, "tune_rounds": tune_rounds or TUNE_ROUNDS}
    try:
        return {"training.learning_rate": None if text is None else float(text), "tune_rounds": tune_rounds}
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number nor auto", param_hint="--learning-rate") from None


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command these options in place of its parameter ``run_flags``, which gets them as settings."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())
    place = [parameter.name for parameter in own].index("run_flags")
    shared = list(inspect.signature(run_options, eval_str=True).parameters.values())

    @functools.wraps(command)
    def wrapped(*args: Any, **arguments: Any) -> None:
        flags = _settings({parameter.name: arguments.pop(parameter.name) for parameter in shared})
        command(*args, run_flags=flags, **arguments)

    keyword = inspect.Parameter.KEYWORD_ONLY
    rest = [parameter.replace(kind=keyword) for parameter in own[place + 1 :]]
    signature = inspect.Signature([*own[:place], *shared, *rest])
    wrapped.__signature__ = signature  # type: ignore[attr-defined]  # inspect honours it
    return wrapped
