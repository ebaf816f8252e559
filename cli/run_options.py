"""The options of a run, for every command that starts one: rounds, training, pruning."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

__all__ = ["run_options", "with_run_options"]

_TRAINING = "Training"
_ROUNDS = "Rounds"
_PRUNING = "Pruning"


def run_options(
    *,
    seed: Annotated[int | None, typer.Option(help="Seed of directions and batches.")] = None,
    devices: Annotated[int | None, typer.Option(help="Devices to wait for.", rich_help_panel=_ROUNDS)] = None,
    per_round: Annotated[
        int | None, typer.Option(help="Devices that a round asks; 0: all that are ready.", rich_help_panel=_ROUNDS)
    ] = None,
    quorum: Annotated[int | None, typer.Option(help="Reports that a round needs.", rich_help_panel=_ROUNDS)] = None,
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
            help="stein: directions over all weights; split: many over the layers behind the cut; node: node "
            "perturbation of the fully connected layers.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    k: Annotated[int | None, typer.Option(help="Directions per device and round.", rich_help_panel=_TRAINING)] = None,
    tail_k: Annotated[
        int | None,
        typer.Option(help="split, node: scalars for the layers behind the cut.", rich_help_panel=_TRAINING),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(help="node: passes with fresh noise.", rich_help_panel=_TRAINING)
    ] = None,
    feedback: Annotated[
        float | None,
        typer.Option(help="node: part of what was not sent that counts next time.", rich_help_panel=_TRAINING),
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
    optimiser: Annotated[
        str | None, typer.Option(help="adam, sgd, momentum or sign_momentum.", rich_help_panel=_TRAINING)
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate.", rich_help_panel=_TRAINING)] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine or constant.", rich_help_panel=_TRAINING)] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Weights to remove [default: the artifact's].", rich_help_panel=_PRUNING)
    ] = None,
    saliency_steps: Annotated[int | None, typer.Option(help="Scoring rounds.", rich_help_panel=_PRUNING)] = None,
    saliency_samples: Annotated[
        int | None, typer.Option(help="Inputs scored on, per device.", rich_help_panel=_PRUNING)
    ] = None,
    saliency_draws: Annotated[
        int | None, typer.Option(help="Whole-layer draws per layer; 4 for deep nets.", rich_help_panel=_PRUNING)
    ] = None,
    saliency_inputs: Annotated[
        str | None, typer.Option(help="gaussian (data-free) or data.", rich_help_panel=_PRUNING)
    ] = None,
) -> dict[str, Any]:
    """The options as settings by dotted name, as ``resolve`` takes them; None where an option was not given."""
    return {
        "seed": seed,
        "devices": devices,
        "participants": per_round,
        "quorum": quorum,
        "deadline_s": deadline,
        "enrol_deadline_s": enrol_deadline,
        "patience": patience,
        "evaluate_every": evaluate_every,
        "training.rounds": rounds,
        "training.estimator": estimator,
        "training.k": k,
        "training.tail_k": tail_k,
        "training.repeats": repeats,
        "training.feedback": feedback,
        "training.directions": directions,
        "training.assignment": assign,
        "training.sigma": sigma,
        "training.two_sided": two_sided,
        "training.batch": batch,
        "training.optimiser.name": optimiser,
        "training.learning_rate": learning_rate,
        "training.schedule": schedule,
        "sparsity": sparsity,
        "saliency.steps": saliency_steps,
        "saliency.samples": saliency_samples,
        "saliency.draws": saliency_draws,
        "saliency.inputs": saliency_inputs,
    }


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command these options in place of its parameter ``run_flags``, which gets them as settings."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())
    place = [parameter.name for parameter in own].index("run_flags")
    shared = list(inspect.signature(run_options, eval_str=True).parameters.values())

    @functools.wraps(command)
    def wrapped(*args: Any, **arguments: Any) -> None:
        flags = run_options(**{parameter.name: arguments.pop(parameter.name) for parameter in shared})
        command(*args, run_flags=flags, **arguments)

    keyword = inspect.Parameter.KEYWORD_ONLY
    rest = [parameter.replace(kind=keyword) for parameter in own[place + 1 :]]
    signature = inspect.Signature([*own[:place], *shared, *rest])
    wrapped.__signature__ = signature  # type: ignore[attr-defined]  # inspect honours it
    return wrapped
